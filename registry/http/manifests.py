"""Manifests: pull, push, delete (OCI distribution spec, end-2, end-3, end-7, end-9)."""

from __future__ import annotations

import asyncio

from registry.http import fields
from registry.http.asgi import Header
from registry.http.body_memory import COUNTED_ANSWER_BYTES, SMALL_BODY_BYTES
from registry.http.errors import TooManyTags
from registry.http.exchange import Exchange
from registry.http.headers import IMMUTABLE, REVALIDATE, content_headers, warning_headers
from storage.content import Condition, Descriptor, Manifest
from storage.errors import ManifestTooLarge, ManifestUnknown, PreconditionFailed
from storage.names import Digest, Reference, Tag, as_reference

_PARSED_ON_LOOP_BYTES = SMALL_BODY_BYTES
"""Bytes of a manifest that is parsed on the event loop, in less than a millisecond. Most are smaller."""


async def get_manifest(exchange: Exchange) -> None:
    """Sends a manifest as it was pushed. Accept is ignored: nothing is converted. A large manifest that has to wait for
    memory is not held meanwhile, so it is read twice."""
    reference = as_reference(exchange.item)
    found: Descriptor | None = None
    manifest: Manifest | None = None
    if exchange.body_memory.is_short:
        found = await exchange.registry.resolve_manifest(exchange.repo, reference)
    if found is None or found.size <= COUNTED_ANSWER_BYTES:
        manifest = await exchange.registry.get_manifest(exchange.repo, reference)
        if len(manifest.body) <= COUNTED_ANSWER_BYTES:
            await _send(exchange, reference, manifest)
            return
        found = Descriptor(manifest.media_type, manifest.digest, len(manifest.body))
    if fields.not_modified(exchange, found.digest):
        manifest = None
        await _send_unchanged(exchange, reference, found.digest)
        return
    share = exchange.body_memory.try_reserve(found.size, found.digest)
    if share is None:
        manifest = None
    async with exchange.body_memory.reserve(found.size, found.digest, share):
        if manifest is None:
            manifest = await exchange.registry.get_manifest(exchange.repo, found.digest)
        await _send(exchange, reference, manifest)


async def _send(exchange: Exchange, reference: Reference, manifest: Manifest) -> None:
    if fields.not_modified(exchange, manifest.digest):
        await _send_unchanged(exchange, reference, manifest.digest)
        return
    headers = _headers(exchange, reference, manifest.digest)
    await exchange.send_whole(200, manifest.body, (b"content-type", manifest.media_type.encode("ascii")), *headers)


async def _send_unchanged(exchange: Exchange, reference: Reference, digest: Digest) -> None:
    await exchange.send_empty(304, *_headers(exchange, reference, digest))


def _headers(exchange: Exchange, reference: Reference, digest: Digest) -> list[Header]:
    caching = IMMUTABLE if isinstance(reference, Digest) else REVALIDATE
    return [*content_headers(digest), caching, *warning_headers(exchange.notice)]


async def head_manifest(exchange: Exchange) -> None:
    reference = as_reference(exchange.item)
    found: Descriptor = await exchange.registry.resolve_manifest(exchange.repo, reference)
    if fields.not_modified(exchange, found.digest):
        await _send_unchanged(exchange, reference, found.digest)
        return
    kind = (b"content-type", found.media_type.encode("ascii"))
    headers = _headers(exchange, reference, found.digest)
    await exchange.send_head(200, [kind, (b"content-length", b"%d" % found.size), *headers])
    await exchange.send_part(b"")


async def put_manifest(exchange: Exchange) -> None:
    """Stores a manifest under a tag or its digest, and under the tags in the query. Location names the digest, which
    stays right when the tag moves."""
    reference = as_reference(exchange.item)
    extra = _read_tags(exchange)
    condition = fields.read_condition(exchange)
    media_type = fields.read_media_type(exchange)
    expected = reference if isinstance(reference, Digest) else None
    most = exchange.limits.manifest
    small = exchange.body_memory.small_body(exchange) if most >= SMALL_BODY_BYTES else None
    if small is not None:
        headers = await _store(exchange, Manifest.parse(small, media_type, expected), reference, extra, condition)
    else:
        async with exchange.body_memory.body(exchange, most, lambda: _too_large(exchange, most)) as body:
            manifest = await _parse(exchange, body, media_type, expected)
            del body
            headers = await _store(exchange, manifest, reference, extra, condition)
            del manifest
    await exchange.send_empty(201, *headers)  # outside the block: nothing is held for a client that does not read it


async def _parse(exchange: Exchange, body: bytes, media_type: str | None, expected: Digest | None) -> Manifest:
    """Parses a manifest; large ones one at a time, since parsing takes up to three times their bytes. Storing does not
    wait for a turn: it may take as long as an upstream does."""
    if len(body) <= _PARSED_ON_LOOP_BYTES:
        return Manifest.parse(body, media_type, expected)
    return await exchange.body_memory.in_turn(
        exchange, lambda: asyncio.to_thread(Manifest.parse, body, media_type, expected)
    )


async def _store(
    exchange: Exchange, manifest: Manifest, reference: Reference, extra: list[Tag], condition: Condition | None
) -> list[Header]:
    """Stores the manifest and returns the headers of the answer."""
    tags = extra
    if isinstance(reference, Tag):
        tags = [reference, *(tag for tag in extra if tag != reference)]
    elif condition is not None:
        await _check_digest(exchange, reference, condition)
        condition = None
    stored = await exchange.registry.put_manifest(exchange.repo, manifest, tags, by=exchange.actor, condition=condition)
    headers = [(b"location", exchange.location("manifests", stored.digest)), *content_headers(stored.digest)]
    if extra:
        headers += [(b"oci-tag", tag.encode("ascii")) for tag in extra]
    if manifest.subject:
        headers.append((b"oci-subject", manifest.subject.encode("ascii")))
    return headers


async def delete_manifest(exchange: Exchange) -> None:
    """Deletes a manifest with all its tags, by its digest, or a single tag."""
    reference = as_reference(exchange.item)
    if isinstance(reference, Digest):
        await exchange.registry.delete_manifest(exchange.repo, reference, by=exchange.actor)
    else:
        await exchange.registry.delete_tag(exchange.repo, reference, by=exchange.actor)
    await exchange.send_empty(202)


def _read_tags(exchange: Exchange) -> list[Tag]:
    given = exchange.query.all("tag")
    if len(given) > exchange.limits.tags_per_put:
        raise TooManyTags(f"{len(given)} tags in one request; at most {exchange.limits.tags_per_put} are taken")
    return list(dict.fromkeys(map(Tag, given)))


def _too_large(exchange: Exchange, most: int) -> ManifestTooLarge:
    if exchange.length is None:
        return ManifestTooLarge(f"the manifest has more than {most} bytes, the most that are taken")
    return ManifestTooLarge(f"the manifest has {exchange.length} bytes; at most {most} are taken")


async def _check_digest(exchange: Exchange, digest: Digest, condition: Condition) -> None:
    """Checks the condition on a PUT by digest. The content of a digest never changes, so a check before the PUT is
    enough."""
    try:
        current: Digest | None = (await exchange.registry.resolve_manifest(exchange.repo, digest)).digest
    except ManifestUnknown:
        current = None
    if not condition.holds(current):
        raise PreconditionFailed("the manifest is there already, or is not there yet, against what was demanded")
