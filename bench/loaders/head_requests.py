"""A loader for HEAD requests, run as a program: `python -m bench.loaders.head_requests PORT PATH SECONDS CONNECTIONS`.

Other loaders do not work: wrk and h2load wait for a body of Content-Length bytes, which a response to HEAD does not
have, and ab speaks HTTP/1.0. Like wrk, this loader sends the next request on a connection once the response is
complete.
"""

from __future__ import annotations

import sys
import time

from bench.errors import TrialFailed
from bench.loaders.connections import Connections
from bench.loaders.http_client import MANIFEST_ACCEPT
from bench.loaders.load_report import LoadReport, print_report, run_loader
from bench.system.servers import HOST

STATUS_OK = b"HTTP/1.1 200"


def run_head_load(port: int, path: str, seconds: float, connections: int) -> LoadReport:
    """Runs this module as a program, and returns its report. Raises TrialFailed."""
    command = [sys.executable, "-m", "bench.loaders.head_requests", str(port), path, str(seconds), str(connections)]
    return run_loader(command, seconds)


def send_heads(port: int, path: str, seconds: float, connections: int) -> None:
    """Sends the requests and prints the report. Raises TrialFailed at the first response that is not 200."""
    request = f"HEAD {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nAccept: {MANIFEST_ACCEPT}\r\n\r\n".encode()
    times, received, clock = list[float](), 0, time.perf_counter
    with Connections(port, head_only=True) as opened:
        idle = [opened.open() for _ in range(connections)]
        begun = clock()
        for connection in idle:
            opened.send(connection, request)
        while (now := clock()) - begun < seconds:
            for connection, answer, took in opened.responses(1.0):
                if not answer.startswith(STATUS_OK):
                    raise TrialFailed(f"HEAD {path} gave {answer[:200]!r}")
                received += len(answer)
                times.append(took)
                opened.send(connection, request)
    print_report(times, received, now - begun)


if __name__ == "__main__":
    send_heads(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
