"""Uploads in a Python without OpenSSL's hashes: `python -m tests.unit.storage.store.uploads_without_libcrypto DATA`.

The import of `_hashlib` fails, as in a Python that was built without this module, and the machine has no libcrypto.
`hashlib` then uses its own code.
"""

from __future__ import annotations

import sys

sys.modules["_hashlib"] = None  # type: ignore[assignment]

import asyncio  # noqa: E402
import hashlib  # noqa: E402
import itertools  # noqa: E402
import random  # noqa: E402
from pathlib import Path  # noqa: E402

from storage import running_digest  # noqa: E402
from storage.composition import open_registry, prepare_data_dir  # noqa: E402
from storage.names import ALGORITHMS, Digest, RepositoryName  # noqa: E402
from storage.running_digest import HashlibDigest, start_digest  # noqa: E402
from storage.store.stored_registry import StoredRegistry  # noqa: E402

APP = RepositoryName("team/app")
CHUNK_BOUNDS = (0, 1, 1_100_000, 1_100_100, 2_500_000)
"""The offsets at which the chunks of a blob begin, and the size of the blob."""


async def _upload(first: StoredRegistry, second: StoredRegistry, algorithm: str, declared: str) -> None:
    """Uploads a blob in chunks, alternately to two registries over the same data. `declared`: the digest algorithm that
    the client states at the start. `algorithm`: the algorithm of the digest at the end."""
    body = random.Random(f"{algorithm} {declared}").randbytes(CHUNK_BOUNDS[-1])
    writer = await first.start_upload(APP, declared)
    await writer.aclose()
    for number, (start, stop) in enumerate(itertools.pairwise(CHUNK_BOUNDS)):
        writer = await (second, first)[number % 2].resume_upload(APP, writer.id, start)
        await writer.write(body[start:stop])
        await writer.aclose()
    digest = Digest(f"{algorithm}:{hashlib.new(algorithm, body).hexdigest()}")
    writer = await second.resume_upload(APP, writer.id)
    await writer.commit(digest)
    await writer.aclose()
    reader = await first.open_blob(APP, digest)
    assert b"".join([chunk async for chunk in reader]) == body
    await reader.aclose()


async def main(data: Path) -> None:
    """Uploads blobs with each pair of algorithms. Then checks that an upload starts again at offset 0 after a restart
    of the machine (another boot id): without `_hashlib`, the state of the running digest cannot be saved with the
    upload, so the bytes that were received before the restart cannot be verified."""
    running_digest._SYSTEM_LIBRARIES = ()
    assert isinstance(start_digest("sha256"), HashlibDigest)
    prepare_data_dir(data)
    async with open_registry(data, boot="first") as first, open_registry(data, boot="first") as second:
        for algorithm in ALGORITHMS:
            for declared in ALGORITHMS:
                await _upload(first, second, algorithm, declared)
        unfinished = await first.start_upload(APP)
        await unfinished.write(b"x" * 5000)
        await unfinished.aclose()
    async with open_registry(data, boot="second") as after:
        assert await after.upload_offset(APP, unfinished.id) == 0, (
            "the bytes that were received before the restart were not discarded"
        )


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
