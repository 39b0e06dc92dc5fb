"""A loader for HEAD, run as a program: `python -m bench.loaders.head_requests PORT PATH SECONDS CONNECTIONS ACCEPT`.

wrk and h2load wait for the body that a HEAD's Content-Length announces and never comes; ab speaks HTTP/1.0. This one
keeps connections open as wrk does: each sends the next request when its answer is whole. Prints wrk's line.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time

from bench.errors import TrialFailed
from bench.loaders.http_client import HOST
from bench.loaders.wrk import LOADER_MARGIN_SECONDS, LoadReport, parse_report, run_loader

HEAD_END = b"\r\n\r\n"
STATUS_OK = b"HTTP/1.1 200"


def run_head_load(port: int, path: str, seconds: float, connections: int, accept: str) -> LoadReport:
    """Runs this module as a program of its own. Raises TrialFailed."""
    command = [
        sys.executable,
        "-m",
        "bench.loaders.head_requests",
        str(port),
        path,
        str(seconds),
        str(connections),
        accept,
    ]
    return parse_report(run_loader(command, seconds + LOADER_MARGIN_SECONDS), 0)


def send_heads(port: int, path: str, seconds: float, connections: int, accept: str) -> dict[str, int]:
    """The load itself; wrk's figures. Raises TrialFailed at the first answer that is not 200."""
    request = f"HEAD {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nAccept: {accept}\r\n\r\n".encode()
    poll, sockets = select.epoll(), {}
    for _ in range(connections):
        one = socket.create_connection((HOST, port), timeout=LOADER_MARGIN_SECONDS)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        poll.register(one, select.EPOLLIN)
        sockets[one.fileno()] = one
    times, received, sent = [], 0, {}
    clock = time.perf_counter
    begun = clock()
    for number, one in sockets.items():
        sent[number] = clock()
        one.send(request)
    while (now := clock()) - begun < seconds:
        for number, _ in poll.poll(1.0):
            one = sockets[number]
            answer = one.recv(65536)
            if not answer.startswith(STATUS_OK) or not answer.endswith(HEAD_END):
                raise TrialFailed(f"HEAD {path} gave {answer[:200]!r}")
            received += len(answer)
            now = clock()
            times.append(now - sent[number])
            sent[number] = now
            one.send(request)
    for one in sockets.values():
        one.close()
    return _figures(times, received, now - begun)


def _figures(times: list[float], received: int, seconds: float) -> dict[str, int]:
    times.sort()
    p50, p99 = (round(times[int(len(times) * part)] * 1e6) if times else 0 for part in (0.5, 0.99))
    figures = {"requests": len(times), "microseconds": round(seconds * 1e6), "bytes": received}
    return {**figures, "errors": 0, "p50": p50, "p99": p99}


def main(arguments: list[str]) -> int:
    port, path, seconds, connections, accept = arguments
    try:
        print("BENCH", json.dumps(send_heads(int(port), path, float(seconds), int(connections), accept)))
    except (TrialFailed, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
