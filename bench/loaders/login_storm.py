"""Wrong logins, as many as the server takes, run as a program: `python -m bench.loaders.login_storm PORT TOKEN LOGINS
ROUND`.

64 connections from 16 addresses, so that what slows one address down helps only so much; each sends the next login
when its answer is there. Half of them guess at one account, half at accounts that are not there. Beside them, a client
with a token asks for `/v2/` every few milliseconds: its times are what is printed, as wrk prints its own.
"""

from __future__ import annotations

import base64
import json
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator

from bench.errors import TrialFailed
from bench.loaders.http_client import HOST
from bench.loaders.wrk import LOADER_MARGIN_SECONDS, LoadReport, parse_report, run_loader

CONNECTIONS = 64
ADDRESSES = 16
LOGINS = 10_000
GUESSED_ACCOUNT = "bench"
"""The account that is guessed at."""
PROBE_PAUSE_SECONDS = 0.005
"""Seconds between an answer for `/v2/` and the next request."""
STORM_TIMEOUT = 300.0
"""Seconds that all the logins may take."""
REFUSED_STATUSES = (b"HTTP/1.1 401", b"HTTP/1.1 429")
HEAD_END = b"\r\n\r\n"


def run_login_storm(port: int, token: str, number: int, logins: int = LOGINS) -> tuple[LoadReport, float]:
    """Runs this module as a program of its own: what the client beside saw, and logins refused a second. `number`: of
    the round, which has its own addresses. Raises TrialFailed, also when a login was answered otherwise."""
    command = [sys.executable, "-m", "bench.loaders.login_storm", str(port), token, str(logins), str(number)]
    seen = parse_report(run_loader(command, STORM_TIMEOUT + LOADER_MARGIN_SECONDS), 0)
    return seen, logins / seen.seconds


class LoginStorm:
    """The connections, and what has come back."""

    def __init__(self, port: int, token: str, logins: int, number: int) -> None:
        self.poll = select.epoll()
        self.left = logins
        self.open = logins
        self.answers: Counter[bytes] = Counter()
        self.times: list[float] = []
        self._guesses = self._wrong(port, logins, number)
        self._others: dict[int, socket.socket] = {}
        self._partly: dict[int, bytes] = {}
        for place in range(CONNECTIONS):
            one = self._connect(port, f"127.0.{number % 200 + 1}.{place % ADDRESSES + 2}")
            self._others[one.fileno()] = one
        self._mine = self._connect(port, HOST)
        self._ask = f"GET /v2/ HTTP/1.1\r\nHost: {HOST}:{port}\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        self._asked_at = 0.0
        self._next = 0.0

    def _connect(self, port: int, source: str) -> socket.socket:
        one = socket.create_connection((HOST, port), LOADER_MARGIN_SECONDS, (source, 0))
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.poll.register(one, select.EPOLLIN)
        return one

    def _wrong(self, port: int, logins: int, number: int) -> Iterator[bytes]:
        """Requests for a token, no two alike."""
        for guess in range(logins):
            name = GUESSED_ACCOUNT if guess % 2 else f"nobody-{number}-{guess}"
            login = base64.b64encode(f"{name}:a wrong password {number}.{guess}".encode()).decode()
            head = f"Host: {HOST}:{port}\r\nAuthorization: Basic {login}"
            yield f"GET /token?service=entrepot HTTP/1.1\r\n{head}\r\n\r\n".encode()

    def run(self) -> None:
        """Until all the logins are refused. Raises TrialFailed, OSError."""
        for one in self._others.values():
            self._guess(one)
        until = time.perf_counter() + STORM_TIMEOUT
        while self.open:
            now = time.perf_counter()
            if now > until:
                raise TrialFailed(f"{self.open} of the logins are not answered after {STORM_TIMEOUT:.0f} s")
            if not self._asked_at and now >= self._next:
                self._asked_at = time.perf_counter()
                self._mine.send(self._ask)
            for number, _ in self.poll.poll(PROBE_PAUSE_SECONDS if self._asked_at else max(0.0, self._next - now)):
                if number == self._mine.fileno():
                    self._take_mine()
                else:
                    self._take(number)

    def _guess(self, one: socket.socket) -> None:
        request = next(self._guesses, None)
        if request is not None:
            one.send(request)

    def _take_mine(self) -> None:
        answer = self._mine.recv(65536)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise TrialFailed(f"GET /v2/ gave {answer[:200]!r}")
        now = time.perf_counter()
        self.times.append(now - self._asked_at)
        self._asked_at, self._next = 0.0, now + PROBE_PAUSE_SECONDS

    def _take(self, number: int) -> None:
        answer = self._partly.pop(number, b"") + self._others[number].recv(65536)
        head, whole, body = answer.partition(HEAD_END)
        if not whole or len(body) < _length(head):
            self._partly[number] = answer
            return
        status = head[: len(REFUSED_STATUSES[0])]
        if status not in REFUSED_STATUSES:
            raise TrialFailed(f"a wrong login gave {answer[:200]!r}")
        self.answers[status] += 1
        self.open -= 1
        self._guess(self._others[number])

    def close(self) -> None:
        for one in (*self._others.values(), self._mine):
            one.close()
        self.poll.close()


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return 0


def main(arguments: list[str]) -> int:
    port, token, logins, number = arguments
    storm = LoginStorm(int(port), token, int(logins), int(number))
    begun = time.perf_counter()
    try:
        storm.run()
    except (TrialFailed, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        storm.close()
    seconds, times = time.perf_counter() - begun, sorted(storm.times)
    p50, p99 = (round(times[int(len(times) * part)] * 1e6) for part in (0.5, 0.99))
    figures = {"requests": len(times), "microseconds": round(seconds * 1e6), "bytes": 0, "errors": 0}
    print({status.decode(): count for status, count in storm.answers.items()}, f"longest {times[-1] * 1e3:.1f} ms")
    print("BENCH", json.dumps({**figures, "p50": p50, "p99": p99}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
