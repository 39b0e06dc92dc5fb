"""Manifests as they come from a far registry. Large ones are parsed in a thread: a worker's loop serves everybody."""

from __future__ import annotations

import asyncio

from registry.upstream.addresses import place
from registry.upstream.answers import Answer
from storage.content import INDEXES, OCI_INDEX, Descriptor, Manifest
from storage.errors import DigestInvalid, ManifestInvalid, UpstreamUnavailable
from storage.names import Digest, Reference

PARSED_HERE = 256 << 10
"""Bytes up to which it takes less than a millisecond or two."""


async def checked(answer: Answer, reference: Reference) -> Manifest:
    """The manifest, once its bytes have the digest asked for, or the one the answer names. Raises
    UpstreamUnavailable."""
    where = place(answer.url)
    try:
        return await _parse(
            answer.body, answer.media_type, reference if isinstance(reference, Digest) else answer.digest
        )
    except DigestInvalid:
        raise UpstreamUnavailable(f"{where} sends a manifest whose bytes have another digest") from None
    except ManifestInvalid as error:
        raise UpstreamUnavailable(f"{where} sends a manifest that is not valid: {error.message}") from None


async def descriptors(answer: Answer) -> tuple[Descriptor, ...]:
    """Those of an index; none where it is another manifest. Raises UpstreamUnavailable."""
    try:
        index = await _parse(answer.body, answer.media_type or OCI_INDEX, None)
    except ManifestInvalid as error:
        raise UpstreamUnavailable(f"{place(answer.url)} sends an index that is not valid: {error.message}") from None
    return tuple(index.manifests) if index.media_type in INDEXES else ()


async def _parse(body: bytes, media_type: str | None, digest: Digest | None) -> Manifest:
    if len(body) <= PARSED_HERE:
        return Manifest.parse(body, media_type, digest)
    return await asyncio.to_thread(Manifest.parse, body, media_type, digest)
