"""What /proc and the loaders say, read right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.errors import TrialFailed
from bench.loaders.curl_transfers import next_upload_path
from bench.loaders.http_client import location_path
from bench.loaders.load_report import parse_report
from bench.system.machine import parse_steal_seconds
from bench.system.memory_prefault import available_memory
from bench.system.process_tree import (
    CLOCK_TICKS,
    parse_cpu_ticks,
    parse_pss,
    process_tree,
    tree_cpu_seconds,
    tree_pss,
)
from bench.system.programs import REPOSITORY_ROOT

BURN = "import time\nwhile time.process_time() < 0.3: pass"
GOOD = '{"requests":100,"microseconds":2000000,"bytes":5000,"errors":0,"p50":1500,"p99":9000}'


def test_cpu_time_counts_reaped_children() -> None:
    """utime, stime, cutime and cstime are added, whatever the program is called."""
    stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 900 100 0 0 11 22 33 44 20 0 1 0 12345 1000 200"
    assert parse_cpu_ticks(stat) == 11 + 22 + 33 + 44


def test_cpu_time_of_a_child_that_ended_is_not_lost() -> None:
    """The tree's time includes what a child used that was reaped before anybody looked at it."""
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]])\nprint(flush=True)\ninput()"
    command = [sys.executable, "-c", code, BURN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert tree_cpu_seconds(process.pid) >= 0.3 - 2 / CLOCK_TICKS
        process.communicate(b"\n")


def test_tree_and_memory_of_this_process() -> None:
    """A process is in its own tree, and takes memory."""
    assert process_tree(os.getpid())[0] == os.getpid()
    assert tree_pss(os.getpid()) > 1 << 20


def test_pss_is_the_whole_one() -> None:
    """Pss, in bytes, and none of the lines that only look like it."""
    rollup = "Rss:  999 kB\nPss:    120 kB\nPss_Dirty:  70 kB\nPss_Anon: 60 kB\n"
    assert parse_pss(rollup) == 120 * 1024


def test_time_that_the_host_took() -> None:
    """The eighth figure of all processors together, in seconds; guests' time after it is another thing."""
    stat = "cpu  10 20 30 40 50 60 70 250 90 100\ncpu0 1 2 3 4 5 6 7 8 9 10\nintr 5\n"
    assert parse_steal_seconds(stat) == 250 / CLOCK_TICKS
    assert parse_steal_seconds(Path("/proc/stat").read_text()) >= 0


def test_report_of_a_loader() -> None:
    """Requests over time, latencies in milliseconds."""
    seen = parse_report(f"Running 2s test\nBENCH {GOOD}\n", size=50)
    assert (seen.rate, seen.p50, seen.p99) == (50, 1.5, 9)


@pytest.mark.parametrize(
    "out",
    ["nothing", "BENCH " + GOOD.replace('"errors":0', '"errors":1'), "BENCH " + GOOD.replace(":100,", ":0,")],
)
def test_report_of_failed_requests_fails(out: str) -> None:
    """One error, no request at all, or no report: the trial gives no figure."""
    with pytest.raises(TrialFailed):
        parse_report(out, size=0)


def test_report_of_short_bodies_fails() -> None:
    """Fewer bytes than the bodies have: the trial gives no figure."""
    with pytest.raises(TrialFailed, match="more than 5000 bytes"):
        parse_report(f"BENCH {GOOD}", size=51)


def test_upload_goes_on_where_the_registry_says() -> None:
    """A Location may be a path or a whole address, with a state in its query; anything but a 202 fails."""
    assert (
        next_upload_path("", "202 http://127.0.0.1:5000/v2/a/blobs/uploads/1?_state=x")
        == "/v2/a/blobs/uploads/1?_state=x"
    )
    assert location_path("/v2/a/blobs/uploads/1") == "/v2/a/blobs/uploads/1"
    with pytest.raises(TrialFailed):
        next_upload_path("", "404 ")


def test_lua_scripts_exist_for_the_loads() -> None:
    """The scripts lie beside the module that runs them."""
    folder = REPOSITORY_ROOT / "bench" / "loaders" / "lua"
    assert {path.stem for path in folder.glob("*.lua")} == {"report", "put_tags", "any_tag"}


def test_available_memory() -> None:
    """What could be given to programs is known, and is no more than the machine has."""
    assert 0 < available_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
