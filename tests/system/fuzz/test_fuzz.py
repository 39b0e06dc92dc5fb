"""Tests that send thousands of generated malformed requests. The environment variable ENTREPOT_FUZZ_CASES sets their
number: a run with 100000 takes a night."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.fakes.process_resources import eventually, open_files, pss_of
from tests.fakes.raw_http import RawConnection
from tests.fakes.server_process import RegistryServer
from tests.system.fuzz.fuzz_runner import (
    GENERATORS,
    counts_without_sessions,
    make_case,
    push_and_pull,
    run_batch,
    store_counts,
)

SEED = 20_261
CASE_COUNT = int(os.environ.get("ENTREPOT_FUZZ_CASES", "5000"))
BATCH = 500
"""The number of requests between two valid pushes."""
WARM_UP_REQUESTS = 2_500
"""The number of requests before the memory is measured. After them, both workers have processed the largest body of
each kind, whose memory the allocator does not give back."""
MAX_GROWTH = 16 * 1024 * 1024
"""The memory of the server may grow by less than this number of bytes."""


@pytest.mark.timeout(max(300, CASE_COUNT / 10))
def test_malformed_requests(server: RegistryServer) -> None:
    """Each malformed request gets a 4xx response in the format of errors. No worker crashes, and the log has no
    traceback. Memory and the number of open files do not grow, and the data directory does not change. After every 500
    requests, a valid push and pull succeed."""
    run_batch(server, SEED - 1, range(3 * len(GENERATORS)))
    push_and_pull(server)
    pids, workers = server.pids(), server.worker_pids()
    assert len(workers) == 2
    for start in range(0, WARM_UP_REQUESTS, BATCH):
        run_batch(server, SEED - 1, range(start, start + BATCH))
    counts_before = counts_without_sessions(server)
    memory_before = pss_of(pids)
    files_before = open_files(workers)

    for start in range(0, CASE_COUNT, BATCH):
        run_batch(server, SEED, range(start, start + BATCH))
        push_and_pull(server)

    assert server.pids() == pids
    assert "Traceback" not in server.log_text()
    assert " ERROR " not in server.log_text()
    assert eventually(lambda: store_counts(server) == counts_before), f"{counts_before} became {store_counts(server)}"
    assert eventually(lambda: all(open_files([pid])[pid] <= files_before[pid] for pid in workers)), (
        files_before,
        open_files(workers),
    )
    growth = pss_of(pids) - memory_before
    assert growth < MAX_GROWTH, f"grew by {growth / 2**20:.1f} MiB"


def test_generator_is_deterministic() -> None:
    """A generated case depends only on the seed and its number, so a failed case can be repeated alone."""
    for index in range(0, 500, 7):
        assert make_case(SEED, index) == make_case(SEED, index)
        assert make_case(SEED, index).raw == make_case(SEED, index).raw


def test_generator_makes_all_kinds() -> None:
    """Every kind of case is generated equally often, and more than 3000 of 10,000 requests differ."""
    cases = [make_case(SEED, index) for index in range(10_000)]
    counts = Counter(case.kind for case in cases)
    assert len(counts) == len(GENERATORS)
    assert min(counts.values()) >= 10_000 // len(GENERATORS)
    assert len({case.raw for case in cases}) > 3000


def test_no_file_outside_the_data_directory_is_served(server: RegistryServer, tmp_path: Path) -> None:
    """Paths with `..` in several encodings reach no file outside the data directory."""
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
