"""Checks whether this process can serve requests (`Readiness`). Results are not cached.

A *check* tests one thing that the registry needs: the database, the database's version, or the disk. No check asks an
upstream registry, because a mirror whose upstream is down still serves its cached content.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from storage.composition import check_version
from storage.data_dir.check import DataDirectoryError
from storage.data_dir.system import DISK_FULL_ERRNOS
from storage.errors import RegistryError
from storage.interface import Lister
from storage.store.stored_registry import StoredRegistry

CHECK_SECONDS: Final = 5.0
"""Time limit of a check, for the case that the disk hangs."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check. `name`: the name of the check. `reason`: what is wrong; None if nothing is wrong."""

    name: str
    reason: str | None


class Readiness:
    """The checks of one process."""

    def __init__(
        self,
        registry: Lister,
        store: StoredRegistry | None = None,
        data: Path | None = None,
        *,
        seconds: float = CHECK_SECONDS,
    ) -> None:
        """`registry`: the registry that the process serves. `store`: the registry's store in the data directory
        `data`. If `store` and `data` are None, there is no data directory, and only `registry` is checked. `seconds`:
        the time limit of each check."""
        self._registry = registry
        self._seconds = seconds
        self._checks: dict[str, Callable[[], Awaitable[str | None]]] = {"database": self._check_database}
        if store is not None and data is not None:
            self._checks["migrations"] = lambda: _check_version(store, data)
            self._checks["disk"] = lambda: _check_disk(store, data)
        self._tasks: dict[str, asyncio.Task[str | None]] = {}

    async def check(self, exclude: Collection[str] = ()) -> list[CheckResult]:
        """Runs all checks at the same time, except those whose names are in `exclude`, and returns their results. A
        check that exceeds the time limit counts as failed, but continues to run. A call that finds a check still
        running waits for its result and does not start it again."""
        names = [name for name in self._checks if name not in exclude]
        tasks = {name: self._find_or_start(name) for name in names}
        if tasks:
            await asyncio.wait(tasks.values(), timeout=self._seconds)
        return [CheckResult(name, self._reason(task)) for name, task in tasks.items()]

    def _find_or_start(self, name: str) -> asyncio.Task[str | None]:
        """Returns the task of the check with this name. Starts the check if it is not running."""
        if name not in self._tasks or self._tasks[name].done():
            self._tasks[name] = asyncio.ensure_future(self._run(name))
        return self._tasks[name]

    async def _run(self, name: str) -> str | None:
        """Runs a check. Returns what is wrong; None if nothing is wrong."""
        try:
            return await self._checks[name]()
        except RegistryError as error:
            return error.message
        except OSError as error:
            return error.strerror or str(error)

    def _reason(self, task: asyncio.Task[str | None]) -> str | None:
        """Returns the reason for the `CheckResult` of a check that has ended or has exceeded the time limit."""
        if not task.done():
            return f"no result within {self._seconds:g} s: the disk or the database hangs"
        if task.cancelled():
            return "the check was stopped"
        return task.result()

    async def _check_database(self) -> str | None:
        await self._registry.repositories(None, 1)  # reads one name from the list of repositories
        return None


async def _check_version(store: StoredRegistry, data: Path) -> str | None:
    """Returns why the database does not have the tables that this version of Entrepot needs; None if it has them.

    Skips a store that is open read-only, because the disk is then too full for the files that the check writes. The
    version of this store was checked when it was opened."""
    return None if store.is_read_only else await asyncio.to_thread(_version_problem, data)


def _version_problem(data: Path) -> str | None:
    """Like `_check_version`, for a store that is not open read-only. Blocks."""
    try:
        check_version(data)
    except DataDirectoryError as error:
        return str(error)
    return None


async def _check_disk(store: StoredRegistry, data: Path) -> str | None:
    """Returns why no new content can be stored; None if content can be stored."""
    if (problem := await asyncio.to_thread(store.directory_problem)) is not None:
        return problem
    return store.storage_problem() or store.push_refusal_reason() or await asyncio.to_thread(write_problem, data)


def write_problem(directory: Path) -> str | None:
    """Returns the problem that prevents writing a file in the directory; None if a file can be written. To find out,
    writes a byte to a temporary file, which the system removes even if the process is killed. Blocks."""
    with suppress(OSError):
        if os.statvfs(directory).f_flag & os.ST_RDONLY:
            return f"the file system of {directory} is mounted read-only, perhaps because the disk had errors"
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            file.write(b"\0")
            os.fsync(file.fileno())
    except OSError as error:
        hint = " (the disk is full)" if error.errno in DISK_FULL_ERRNOS else ""
        return f"cannot write to {directory}: {error.strerror}{hint}"
    return None
