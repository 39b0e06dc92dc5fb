"""Tests of the benchmarks' parsers for /proc and for the reports of loaders (load generators)."""

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
GOOD_REPORT = '{"requests":100,"microseconds":2000000,"bytes":5000,"errors":0,"p50":1500,"p99":9000}'


def test_cpu_time_counts_reaped_children() -> None:
    """The CPU time is the sum of utime, stime, cutime and cstime, also if the program's name has spaces and
    parentheses."""
    stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 900 100 0 0 11 22 33 44 20 0 1 0 12345 1000 200"
    assert parse_cpu_ticks(stat) == 11 + 22 + 33 + 44


def test_cpu_time_of_a_child_that_ended_is_not_lost() -> None:
    """The CPU time of a process tree includes that of a child which had ended before the first reading."""
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]])\nprint(flush=True)\ninput()"
    command = [sys.executable, "-c", code, BURN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert tree_cpu_seconds(process.pid) >= 0.3 - 2 / CLOCK_TICKS
        process.communicate(b"\n")


def test_tree_and_memory_of_this_process() -> None:
    """The process tree of a process begins with the process itself, and its memory is not 0."""
    assert process_tree(os.getpid())[0] == os.getpid()
    assert tree_pss(os.getpid()) > 1 << 20


def test_pss_is_parsed() -> None:
    """Only the line `Pss` counts, not lines with similar names. The result is in bytes."""
    rollup = "Rss:  999 kB\nPss:    120 kB\nPss_Dirty:  70 kB\nPss_Anon: 60 kB\n"
    assert parse_pss(rollup) == 120 * 1024


def test_time_withheld_by_the_host() -> None:
    """The withheld CPU time (steal) is the eighth number of the first line, which is the sum over all processors."""
    stat = "cpu  10 20 30 40 50 60 70 250 90 100\ncpu0 1 2 3 4 5 6 7 8 9 10\nintr 5\n"
    assert parse_steal_seconds(stat) == 250 / CLOCK_TICKS
    assert parse_steal_seconds(Path("/proc/stat").read_text()) >= 0


def test_report_of_a_loader() -> None:
    """The rate is the number of requests per second. Latencies are in milliseconds."""
    report = parse_report(f"Running 2s test\nBENCH {GOOD_REPORT}\n", size=50)
    assert (report.rate, report.p50, report.p99) == (50, 1.5, 9)


@pytest.mark.parametrize(
    "out",
    [
        "nothing",
        "BENCH " + GOOD_REPORT.replace('"errors":0', '"errors":1'),
        "BENCH " + GOOD_REPORT.replace(":100,", ":0,"),
    ],
)
def test_report_of_failed_requests_fails(out: str) -> None:
    """A report with a failed request, a report without requests, and output without a report raise TrialFailed."""
    with pytest.raises(TrialFailed):
        parse_report(out, size=0)


def test_report_of_short_bodies_fails() -> None:
    """A report with fewer received bytes than the expected bodies have raises TrialFailed."""
    with pytest.raises(TrialFailed, match="only 5000 bytes"):
        parse_report(f"BENCH {GOOD_REPORT}", size=51)


def test_upload_continues_at_the_location() -> None:
    """The next request of an upload goes to the Location, which can be a path or a whole URL with a query. A status
    other than 202 raises TrialFailed."""
    assert (
        next_upload_path("", "202 http://127.0.0.1:5000/v2/a/blobs/uploads/1?_state=x")
        == "/v2/a/blobs/uploads/1?_state=x"
    )
    assert location_path("/v2/a/blobs/uploads/1") == "/v2/a/blobs/uploads/1"
    with pytest.raises(TrialFailed):
        next_upload_path("", "404 ")


def test_lua_scripts_exist_for_the_loads() -> None:
    """All Lua scripts that the bench uses exist. Those that choose requests define the function `request`."""
    folder = REPOSITORY_ROOT / "bench" / "loaders" / "lua"
    defined = {path.stem: path.read_text().count("\nfunction request()") for path in folder.glob("*.lua")}
    assert defined == {"report": 0, "put_tags": 1, "any_tag": 1}


def test_available_memory() -> None:
    """The available memory is positive and at most the memory of the machine."""
    assert 0 < available_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
