"""A program that runs eight concurrent writers in one process: `python -m tests.system.race.writer_process DATA NAME`.
Each writer puts 200 manifests. The writers begin when the program has read a line from stdin."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from storage.composition import open_registry
from storage.names import RepositoryName, Tag
from tests.system.race.gated_system import BY, manifest_of

WRITERS = 8
CHANGES = 200
"""The number of manifests that each writer puts."""


async def main(data: Path, name: str) -> None:
    async with open_registry(data) as registry:
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)

        async def write(number: int) -> None:
            repo = RepositoryName(f"{name}/{number}")
            for change in range(CHANGES):
                manifest = manifest_of(f"{name} {number} {change}".encode())
                await registry.put_manifest(repo, manifest, [Tag(f"t{change}"), Tag("latest")], by=BY, sparse=True)

        await asyncio.gather(*map(write, range(WRITERS)))


def expected(name: str, number: int, change: int) -> str:
    """Returns the digest of the manifest that the change puts. `number`: the number of the writer."""
    return manifest_of(f"{name} {number} {change}".encode()).digest


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
