"""Uploads in a Python without OpenSSL's hashes: `python -m tests.unit.storage.store.uploads_without_libcrypto DATA`.

The import of `_hashlib` fails as in a Python that was built without it. hashlib then uses its own code.
"""

from __future__ import annotations

import sys

sys.modules["_hashlib"] = None  # type: ignore[assignment]

import asyncio  # noqa: E402
import hashlib  # noqa: E402
import itertools  # noqa: E402
import random  # noqa: E402
from pathlib import Path  # noqa: E402

from storage.composition import open_registry, prepare_data_dir  # noqa: E402
from storage.names import ALGORITHMS, Digest, RepositoryName  # noqa: E402
from storage.running_digest import HashlibDigest, start_digest  # noqa: E402
from storage.store.stored_registry import StoredRegistry  # noqa: E402

APP = RepositoryName("team/app")
CUTS = (0, 1, 1_100_000, 1_100_100, 2_500_000)


async def _upload(one: StoredRegistry, two: StoredRegistry, algorithm: str, declared: str) -> None:
    body = random.Random(f"{algorithm} {declared}").randbytes(CUTS[-1])
    writer = await one.start_upload(APP, declared)
    await writer.aclose()
    for number, (start, stop) in enumerate(itertools.pairwise(CUTS)):
        writer = await (two, one)[number % 2].resume_upload(APP, writer.id, start)
        await writer.write(body[start:stop])
        await writer.aclose()
    digest = Digest(f"{algorithm}:{hashlib.new(algorithm, body).hexdigest()}")
    writer = await two.resume_upload(APP, writer.id)
    await writer.commit(digest)
    await writer.aclose()
    reader = await one.open_blob(APP, digest)
    assert b"".join([chunk async for chunk in reader]) == body
    await reader.aclose()


async def main(data: Path) -> None:
    assert isinstance(start_digest("sha256"), HashlibDigest)
    prepare_data_dir(data)
    async with open_registry(data, boot="first") as one, open_registry(data, boot="first") as two:
        for algorithm in ALGORITHMS:
            for declared in ALGORITHMS:
                await _upload(one, two, algorithm, declared)
        left = await one.start_upload(APP)
        await left.write(b"x" * 5000)
        await left.aclose()
    async with open_registry(data, boot="second") as after:
        assert await after.upload_offset(APP, left.id) == 0, "nothing can be told from garbage without a saved digest"


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
