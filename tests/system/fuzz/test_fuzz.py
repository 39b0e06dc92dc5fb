"""Malformed requests from a generator with a seed. `ENTREPOT_FUZZ_CASES=100000` makes a run that takes a night."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.fakes.process_resources import eventually, open_files, pss_of
from tests.fakes.raw_http import RawConnection
from tests.fakes.server_process import RegistryServer
from tests.system.fuzz.fuzz_runner import GENERATORS, make_case, push_and_pull, run_batch, store_counts

SEED = 20_261
COUNT = int(os.environ.get("ENTREPOT_FUZZ_CASES", "5000"))
BATCH = 500
WARMING = 2_500
"""Until both workers have met the largest body of each kind: an allocator keeps room for what it has seen."""
GROWTH = 16 * 1024 * 1024


@pytest.mark.timeout(max(300, COUNT / 10))
def test_malformed_requests(server: RegistryServer) -> None:
    """Each request gets a 4xx in the format of errors; there is no 5xx, no traceback and no crash. Memory and open
    files do not grow, the data directory does not change, and after every 500 requests a valid push and pull
    succeed."""
    run_batch(server, SEED - 1, range(3 * len(GENERATORS)))
    push_and_pull(server)
    pids, workers = server.pids(), server.worker_pids()
    assert len(workers) == 2
    for start in range(0, WARMING, BATCH):
        run_batch(server, SEED - 1, range(start, start + BATCH))
    before = store_counts(server)
    settled = pss_of(pids)
    files = open_files(workers)

    for start in range(0, COUNT, BATCH):
        run_batch(server, SEED, range(start, start + BATCH))
        push_and_pull(server)

    assert server.pids() == pids
    assert "Traceback" not in server.log_text()
    assert " ERROR " not in server.log_text()
    assert eventually(lambda: store_counts(server) == before), f"{before} became {store_counts(server)}"
    assert eventually(lambda: all(open_files([pid])[pid] <= files[pid] for pid in workers)), (
        files,
        open_files(workers),
    )
    growth = pss_of(pids) - settled
    assert growth < GROWTH, f"grew by {growth / 2**20:.1f} MiB"


def test_the_generator_repeats_itself() -> None:
    """A case depends only on the seed and its number, so a failed case can be sent again alone."""
    for index in range(0, 500, 7):
        assert make_case(SEED, index) == make_case(SEED, index)
        assert make_case(SEED, index).raw == make_case(SEED, index).raw


def test_the_generator_covers_its_kinds() -> None:
    """Each kind of case is equally frequent, and thousands of the requests differ."""
    cases = [make_case(SEED, index) for index in range(10_000)]
    counts = Counter(case.kind for case in cases)
    assert len(counts) == len(GENERATORS)
    assert min(counts.values()) >= 10_000 // len(GENERATORS)
    assert len({case.raw for case in cases}) > 3000


def test_nothing_outside_the_data_directory_was_read(server: RegistryServer, tmp_path: Path) -> None:
    """Path tricks in all encodings reach no file outside the data directory."""
    secret = server.data.parent / "secret.txt"
    secret.write_text("not for you")
    tricks = [
        "../secret.txt",
        "..%2fsecret.txt",
        "%2e%2e/secret.txt",
        "..%252fsecret.txt",
        "....//secret.txt",
        "..%5csecret.txt",
    ]
    with RawConnection(("127.0.0.1", server.port)) as wire:
        for trick in tricks:
            for prefix in ("/", "/v2/", "/v2/a/blobs/", "/v2/a/manifests/", "/v2/a/blobs/uploads/"):
                answer = wire.ask("GET", prefix + trick)
                assert answer.status in (400, 404)
                assert b"not for you" not in answer.body
