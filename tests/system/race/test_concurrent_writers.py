"""Several processes that change one database at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from storage.composition import open_registry
from storage.names import RepositoryName, Tag
from tests.fakes.server_process import ROOT
from tests.system.race.writer_process import CHANGES, WRITERS, expected


def _write(data: Path, names: list[str]) -> None:
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


async def test_writers_of_two_processes_never_fail_and_lose_nothing(data: Path) -> None:
    """Two processes with eight writers each make 200 changes a writer: none fails, and all changes are stored."""
    names = ["one", "two"]
    _write(data, names)
    async with open_registry(data) as registry:
        for name in names:
            for number in range(WRITERS):
                repo = RepositoryName(f"{name}/{number}")
                assert len((await registry.tags(repo, None, 1000)).items) == CHANGES + 1
                for change in (0, CHANGES // 2, CHANGES - 1):
                    found = await registry.resolve_manifest(repo, Tag(f"t{change}"))
                    assert found.digest == expected(name, number, change)
                latest = await registry.resolve_manifest(repo, Tag("latest"))
                assert latest.digest == expected(name, number, CHANGES - 1)
