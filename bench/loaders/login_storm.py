"""Sends wrong logins as fast as it can, run as a program:
`python -m bench.loaders.login_storm PORT TOKEN LOGINS ROUND`.

64 connections from 16 addresses send logins, so a server that slows down one address gains little. Half of the logins
guess the password of one account, the other half name accounts that do not exist. Meanwhile, a client with a token
requests `/v2/` every few milliseconds. The report has the latencies of this client.
"""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Iterator

from bench.errors import TrialFailed
from bench.loaders.connections import Connections
from bench.loaders.load_report import LoadReport, print_report, run_loader
from bench.system.servers import HOST

CONNECTIONS = 64
ADDRESSES = 16
LOGINS = 10_000
"""Number of logins that are sent."""
GUESSED_ACCOUNT = "bench"
PROBE_PAUSE_SECONDS = 0.005
"""Seconds between a response for `/v2/` and the next request for it."""
STORM_TIMEOUT = 300.0
"""Seconds in which all logins must be refused."""
REFUSED_STATUSES = (b"HTTP/1.1 401", b"HTTP/1.1 429")


def run_login_storm(port: int, token: str, number: int, logins: int = LOGINS) -> tuple[LoadReport, float]:
    """Runs this module as a program. Returns the report of the client with the token, and the number of refused logins
    per second. `number`: the number of the round; each round sends its logins from other addresses. Raises TrialFailed
    on a failure, and when the server accepts a login."""
    command = [sys.executable, "-m", "bench.loaders.login_storm", str(port), token, str(logins), str(number)]
    report = run_loader(command, STORM_TIMEOUT)
    return report, logins / report.seconds


def _wrong_logins(port: int, logins: int, number: int) -> Iterator[bytes]:
    """Yields requests for a token, each with a different wrong login."""
    for guess in range(logins):
        name = GUESSED_ACCOUNT if guess % 2 else f"nobody-{number}-{guess}"
        login = base64.b64encode(f"{name}:a wrong password {number}.{guess}".encode()).decode()
        head = f"Host: {HOST}:{port}\r\nAuthorization: Basic {login}"
        yield f"GET /token?service=entrepot HTTP/1.1\r\n{head}\r\n\r\n".encode()


def send_logins(port: int, token: str, logins: int, number: int) -> None:
    """Sends the logins and prints the report. Raises TrialFailed unless all are refused in time."""
    guesses = _wrong_logins(port, logins, number)
    probe_request = f"GET /v2/ HTTP/1.1\r\nHost: {HOST}:{port}\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    times, open_logins = list[float](), logins
    with Connections(port) as opened:
        guessers = [opened.open(f"127.0.{number % 200 + 1}.{index % ADDRESSES + 2}") for index in range(CONNECTIONS)]
        probe, probing, next_probe = opened.open(), False, 0.0
        begun = time.perf_counter()
        for connection, guess in zip(guessers, guesses, strict=False):
            opened.send(connection, guess)
        while open_logins:
            now = time.perf_counter()
            if now > begun + STORM_TIMEOUT:
                raise TrialFailed(f"{open_logins} logins have no response after {STORM_TIMEOUT:.0f} s")
            if not probing and now >= next_probe:
                opened.send(probe, probe_request)
                probing = True
            for connection, answer, took in opened.responses(
                PROBE_PAUSE_SECONDS if probing else max(0.0, next_probe - now)
            ):
                if connection == probe:
                    _check_status(answer, b"HTTP/1.1 200")
                    times.append(took)
                    probing, next_probe = False, time.perf_counter() + PROBE_PAUSE_SECONDS
                else:
                    _check_status(answer, *REFUSED_STATUSES)
                    open_logins -= 1
                    if guess := next(guesses, b""):
                        opened.send(connection, guess)
    print_report(times, 0, time.perf_counter() - begun)


def _check_status(answer: bytes, *allowed: bytes) -> None:
    if not answer.startswith(allowed):
        raise TrialFailed(f"a request gave {answer[:200]!r}, not one of {allowed}")


if __name__ == "__main__":
    send_logins(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
