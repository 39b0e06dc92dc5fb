"""Requests manifests at a steady rate, run as a program:
`python -m bench.loaders.steady_manifests PORT SECONDS REPOSITORIES`.

Each request is sent at its planned time, even if earlier requests have no response yet. The latency of a request counts
from its planned time. So when the registry stops for a moment, all requests planned for this moment show the delay.
"""

from __future__ import annotations

import random
import sys
import time

from bench.errors import TrialFailed
from bench.growth.synthetic_store import TAGS_PER_REPOSITORY, repository_name
from bench.loaders.connections import Connections
from bench.loaders.http_client import MANIFEST_ACCEPT
from bench.loaders.load_report import LoadReport, print_report, run_loader
from bench.system.servers import HOST

RATE = 200
"""Requests per second. The registry can serve many more, so requests never wait for each other, only for other work of
the registry."""
RESPONSE_TIMEOUT = 20.0
"""Seconds after the last planned request in which all responses must arrive."""
STATUS_OK = b"HTTP/1.1 200"


def run_steady_manifests(port: int, seconds: float, repositories: int) -> LoadReport:
    """Runs this module as a program, and returns its report. `repositories`: the number of repositories in the store.
    Raises TrialFailed."""
    command = [sys.executable, "-m", "bench.loaders.steady_manifests", str(port), str(seconds), str(repositories)]
    return run_loader(command, seconds)


def send_requests(port: int, seconds: float, repositories: int) -> None:
    """Gets manifests by random tags of the store, and prints the report. Raises TrialFailed at the first response that
    is not 200."""
    rng, count, clock = random.Random(7), int(seconds * RATE), time.perf_counter
    times, received, sent = list[float](), 0, 0
    idle, due_times = list[int](), dict[int, float]()
    with Connections(port) as opened:
        begun = clock()
        while len(times) < count:
            while sent < count and begun + sent / RATE <= clock():
                name, tag = repository_name(rng.randrange(repositories)), rng.randrange(TAGS_PER_REPOSITORY)
                head = f"GET /v2/{name}/manifests/t{tag} HTTP/1.1\r\nHost: {HOST}:{port}\r\nAccept: {MANIFEST_ACCEPT}"
                connection = idle.pop() if idle else opened.open()
                due_times[connection] = begun + sent / RATE
                opened.send(connection, f"{head}\r\n\r\n".encode())
                sent += 1
            pause = begun + sent / RATE - clock() if sent < count else 1.0
            for connection, answer, _ in opened.responses(max(0.0, pause)):
                if not answer.startswith(STATUS_OK):
                    raise TrialFailed(f"a manifest gave {answer[:200]!r}")
                times.append(clock() - due_times[connection])
                received += len(answer)
                idle.append(connection)
            if clock() - begun > seconds + RESPONSE_TIMEOUT:
                raise TrialFailed(f"{count - len(times)} manifests did not come")
    print_report(times, received, clock() - begun)


if __name__ == "__main__":
    send_requests(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
