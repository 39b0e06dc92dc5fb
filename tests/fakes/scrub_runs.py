"""For tests of scrub, which reads all blobs and looks for damaged ones: runs scrub on an opened registry, and damages
files of blobs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from storage.names import Digest
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import JobContext, run_in_command
from storage.upkeep.read_rate import ReadRate
from storage.upkeep.scrubber import SCRUB_KIND, Scrubber
from tests.fakes.blob_files import layout_behind

Steps = list[dict[str, Any]]


def file_of(registry: StoredRegistry, digest: Digest) -> Path:
    """Returns the file of a blob."""
    return layout_behind(registry).blob(digest)


def quarantined_file(registry: StoredRegistry, digest: Digest) -> Path:
    """Returns the file with the damaged bytes of a blob."""
    layout = layout_behind(registry)
    return layout.path_of(layout.quarantine_place(digest))


def flip_byte(file: Path, offset: int = 0) -> None:
    """Changes one bit of a file, as a bad disk does."""
    with file.open("r+b") as opened:
        opened.seek(offset)
        (value,) = opened.read(1)
        opened.seek(offset)
        opened.write(bytes([value ^ 1]))


def cut(file: Path) -> None:
    """Deletes the last byte of a file."""
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)


def delete(file: Path) -> None:
    file.unlink()


async def scrub(
    registry: StoredRegistry,
    *,
    rate: float = 1e12,
    continue_after_many_damaged: bool = False,
    quarantine_bytes: int = 1 << 30,
    on_damaged: Callable[[Digest], None] = lambda _: None,
    monotonic: Callable[[], float] | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> tuple[dict[str, Any], Steps]:
    """Runs scrub as the command `entrepot scrub` would. Returns the result and the reported steps."""
    steps: Steps = []

    async def work(context: JobContext) -> dict[str, Any]:
        scrubber = Scrubber(
            registry.damage,
            registry.quarantine,
            ReadRate(rate, monotonic, sleep),
            context,
            quarantine_bytes=quarantine_bytes,
            continue_after_many_damaged=continue_after_many_damaged,
            on_damaged=on_damaged,
        )
        return await scrubber.run()

    result = await run_in_command(
        registry.jobs,
        registry.leases,
        SCRUB_KIND,
        {},
        work,
        actor="cli:alice",
        on_step=lambda step: steps.append(dict(step)),
    )
    return result, steps
