"""Manifests: pull, push, delete (OCI distribution spec, end-2, end-3, end-7, end-9)."""

from __future__ import annotations

import asyncio

from registry.http import params
from registry.http.errors import TooManyTags
from registry.http.exchange import Exchange, Header
from registry.http.intake import HELD, SMALL_BODY
from registry.http.responses import (
    IMMUTABLE,
    REVALIDATE,
    content_headers,
    send_empty,
    send_head,
    send_part,
    send_whole,
    warning_headers,
)
from storage.content import Condition, Descriptor, Manifest
from storage.errors import ManifestTooLarge, ManifestUnknown, PreconditionFailed
from storage.names import Digest, Reference, Tag, as_reference

_PARSED_HERE = SMALL_BODY
"""Bytes up to which a manifest is read on the event loop: in less than a millisecond. Most are smaller."""


def _caching(reference: Reference) -> Header:
    return IMMUTABLE if isinstance(reference, Digest) else REVALIDATE


async def get_manifest(exchange: Exchange) -> None:
    """The bytes as they were pushed. Accept is not looked at: nothing is ever converted. A large one that has to wait
    for room is not held meanwhile, so it is read twice."""
    reference = as_reference(exchange.item)
    found: Descriptor | None = None
    manifest: Manifest | None = None
    if exchange.intake.short:
        found = await exchange.registry.resolve_manifest(exchange.repo, reference)
    if found is None or found.size <= HELD:
        manifest = await exchange.registry.get_manifest(exchange.repo, reference)
        if len(manifest.body) <= HELD:
            await _send(exchange, reference, manifest)
            return
        found = Descriptor(manifest.media_type, manifest.digest, len(manifest.body))
    if params.not_modified(exchange, found.digest):
        manifest = None
        await _send_unchanged(exchange, reference, found.digest)
        return
    share = exchange.intake.try_room(found.size, found.digest)
    if share is None:
        manifest = None
    async with exchange.intake.room(found.size, found.digest, share):
        if manifest is None:
            manifest = await exchange.registry.get_manifest(exchange.repo, found.digest)
        await _send(exchange, reference, manifest)


async def _send(exchange: Exchange, reference: Reference, manifest: Manifest) -> None:
    if params.not_modified(exchange, manifest.digest):
        await _send_unchanged(exchange, reference, manifest.digest)
        return
    headers = [*content_headers(manifest.digest), _caching(reference), *warning_headers()]
    await send_whole(exchange, 200, manifest.body, (b"content-type", manifest.media_type.encode("ascii")), *headers)


async def _send_unchanged(exchange: Exchange, reference: Reference, digest: Digest) -> None:
    headers = [*content_headers(digest), _caching(reference), *warning_headers()]
    await send_empty(exchange, 304, *headers)


async def head_manifest(exchange: Exchange) -> None:
    reference = as_reference(exchange.item)
    found: Descriptor = await exchange.registry.resolve_manifest(exchange.repo, reference)
    headers = [*content_headers(found.digest), _caching(reference), *warning_headers()]
    if params.not_modified(exchange, found.digest):
        await send_empty(exchange, 304, *headers)
        return
    kind = (b"content-type", found.media_type.encode("ascii"))
    await send_head(exchange, 200, [kind, (b"content-length", b"%d" % found.size), *headers])
    await send_part(exchange, b"")


async def put_manifest(exchange: Exchange) -> None:
    """By tag or digest, with further tags in the query. Location names the digest: it is what was just stored, whatever
    becomes of the tag."""
    reference = as_reference(exchange.item)
    extra = _read_tags(exchange)
    condition = params.read_condition(exchange)
    media_type = params.read_media_type(exchange)
    expected = reference if isinstance(reference, Digest) else None
    most = exchange.limits.manifest
    small = exchange.intake.small_body(exchange) if most >= SMALL_BODY else None
    if small is not None:
        headers = await _store(exchange, Manifest.parse(small, media_type, expected), reference, extra, condition)
    else:
        async with exchange.intake.body(exchange, most, lambda: _too_large(exchange, most)) as body:
            manifest = await _parse(exchange, body, media_type, expected)
            del body
            headers = await _store(exchange, manifest, reference, extra, condition)
            del manifest
    await send_empty(exchange, 201, *headers)  # nothing is held for a client that does not read it


async def _parse(exchange: Exchange, body: bytes, media_type: str | None, expected: Digest | None) -> Manifest:
    """A large one is read in its turn. What is read of it takes up to three times its bytes, so storing it needs no
    turn: that may take as long as an upstream does."""
    if len(body) <= _PARSED_HERE:
        return Manifest.parse(body, media_type, expected)
    return await exchange.intake.in_turn(
        exchange, lambda: asyncio.to_thread(Manifest.parse, body, media_type, expected)
    )


async def _store(
    exchange: Exchange, manifest: Manifest, reference: Reference, extra: list[Tag], condition: Condition | None
) -> list[Header]:
    """The headers of the answer."""
    tags = extra
    if isinstance(reference, Tag):
        tags = [reference, *(tag for tag in extra if tag != reference)]
    elif condition is not None:
        await _check_digest(exchange, reference, condition)
        condition = None
    stored = await exchange.registry.put_manifest(exchange.repo, manifest, tags, by=exchange.actor, condition=condition)
    headers = [(b"location", exchange.locate("manifests", stored.digest)), *content_headers(stored.digest)]
    if extra:
        headers += [(b"oci-tag", tag.encode("ascii")) for tag in extra]
    if manifest.subject:
        headers.append((b"oci-subject", manifest.subject.encode("ascii")))
    return headers


async def delete_manifest(exchange: Exchange) -> None:
    """A digest with every tag at it, or just a tag."""
    reference = as_reference(exchange.item)
    if isinstance(reference, Digest):
        await exchange.registry.delete_manifest(exchange.repo, reference, by=exchange.actor)
    else:
        await exchange.registry.delete_tag(exchange.repo, reference, by=exchange.actor)
    await send_empty(exchange, 202)


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
    """A condition on a PUT by digest. What a digest names never changes, so asking before is enough."""
    try:
        current: Digest | None = (await exchange.registry.resolve_manifest(exchange.repo, digest)).digest
    except ManifestUnknown:
        current = None
    if not condition.holds(current):
        raise PreconditionFailed("the manifest is there already, or is not there yet, against what was demanded")
