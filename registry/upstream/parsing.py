"""What a far registry sends as JSON, read so that nobody waits for it: what is large in a thread, one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from registry.upstream.addresses import place
from registry.upstream.answers import Answer
from storage.content import INDEXES, OCI_INDEX, Descriptor, Manifest
from storage.errors import DigestInvalid, ManifestInvalid, UpstreamUnavailable
from storage.json_bounds import SMALL
from storage.names import Digest, Reference

T = TypeVar("T")


class Parser:
    """One upstream's. A document may take ten times its own size in memory while it is read."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)

    async def run(self, size: int, read: Callable[[], T]) -> T:
        """What `read` gives, which reads a document of `size` bytes. Cancelled: it is not begun, or its outcome is
        dropped. Its turn ends with its thread."""
        if size <= SMALL:
            return read()
        await self._turn.acquire()
        try:
            reading = asyncio.get_running_loop().run_in_executor(None, read)
        except BaseException:
            self._turn.release()
            raise
        reading.add_done_callback(self._done)
        try:
            return await asyncio.shield(reading)
        finally:
            del reading  # its error holds this frame: the circle would hold the document until the collector comes by

    def _done(self, reading: asyncio.Future[T]) -> None:
        self._turn.release()
        if not reading.cancelled():
            reading.exception()  # is seen even where nobody waits any more

    async def checked(self, answer: Answer, reference: Reference) -> Manifest:
        """The manifest, once its bytes have the digest asked for, or the one the answer names. Raises
        UpstreamUnavailable."""
        where = place(answer.url)
        try:
            return await self._parse(answer, answer.media_type, _digest_of(answer, reference))
        except DigestInvalid:
            raise UpstreamUnavailable(f"{where} sends a manifest whose bytes have another digest") from None
        except ManifestInvalid as error:
            raise UpstreamUnavailable(f"{where} sends a manifest that is not valid: {error.message}") from None

    async def descriptors(self, answer: Answer) -> tuple[Descriptor, ...]:
        """Those of an index; none where it is another manifest. Raises UpstreamUnavailable."""
        try:
            index = await self._parse(answer, answer.media_type or OCI_INDEX, None)
        except ManifestInvalid as error:
            where = place(answer.url)
            raise UpstreamUnavailable(f"{where} sends an index that is not valid: {error.message}") from None
        return tuple(index.manifests) if index.media_type in INDEXES else ()

    async def _parse(self, answer: Answer, media_type: str | None, digest: Digest | None) -> Manifest:
        return await self.run(len(answer.body), lambda: Manifest.parse(answer.body, media_type, digest))


def _digest_of(answer: Answer, reference: Reference) -> Digest | None:
    return reference if isinstance(reference, Digest) else answer.digest
