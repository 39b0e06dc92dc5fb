"""Tests of several processes that change the same metadata database at the same time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from storage.composition import open_registry
from storage.names import RepositoryName, Tag
from tests.fakes.server_process import ROOT
from tests.system.race.writer_process import CHANGES, WRITERS, expected


def _run_writer_processes(data: Path, names: list[str]) -> None:
    """Starts one `writer_process` for each name, lets all begin together, and waits until they have ended."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.system.race.writer_process", str(data), name],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in names
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.close()
    for process in processes:
        assert process.stdout is not None
        with process.stdout:
            assert process.wait(100) == 0


async def test_two_processes_write_without_errors_or_lost_changes(data: Path) -> None:
    """Two processes run eight writers each, and each writer makes 200 changes. No change fails, and all changes are
    stored."""
    names = ["one", "two"]
    _run_writer_processes(data, names)
    async with open_registry(data) as registry:
        for name in names:
            for number in range(WRITERS):
                repo = RepositoryName(f"{name}/{number}")
                assert len((await registry.tags(repo, None, 1000)).items) == CHANGES + 1
                for change in (0, CHANGES // 2, CHANGES - 1):
                    manifest = await registry.resolve_manifest(repo, Tag(f"t{change}"))
                    assert manifest.digest == expected(name, number, change)
                latest = await registry.resolve_manifest(repo, Tag("latest"))
                assert latest.digest == expected(name, number, CHANGES - 1)
