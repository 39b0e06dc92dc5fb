"""Handlers that pull, push and delete manifests (OCI distribution spec, end-3, end-7, end-9)."""

from __future__ import annotations

import asyncio

from registry.asgi import Header
from registry.http.body_memory import MAX_UNCOUNTED_RESPONSE_BYTES, SMALL_BODY_BYTES
from registry.http.conditional_headers import is_not_modified, read_put_condition
from registry.http.error_statuses import TooManyTags
from registry.http.exchange import Exchange
from registry.http.response_headers import IMMUTABLE, REVALIDATE, content_headers, warning_headers
from storage.content import Condition, Descriptor, Manifest
from storage.errors import ManifestInvalid, ManifestTooLarge, ManifestUnknown, PreconditionFailed
from storage.names import Digest, Reference, Tag, as_reference

_MAX_PARSED_ON_LOOP_BYTES = SMALL_BODY_BYTES
"""The event loop parses manifests of up to this size, in less than a millisecond. A thread parses larger manifests."""


async def get_manifest(exchange: Exchange) -> None:
    """Answers a GET: sends a manifest, byte for byte as it was pushed. Ignores Accept, because the registry never
    converts manifests.

    A manifest of more than `MAX_UNCOUNTED_RESPONSE_BYTES` counts against the worker's memory budget for responses
    (`BodyMemory`). If too little of the budget is free, the handler releases the manifest, waits for memory, and reads
    the manifest again."""
    reference = as_reference(exchange.resource_id)
    descriptor: Descriptor | None = None
    manifest: Manifest | None = None
    if exchange.body_memory.is_response_budget_over_half_used:
        # Looks up the size first, so that the handler reads a large manifest only when there is memory for it.
        descriptor = await exchange.registry.resolve_manifest(exchange.repo, reference)
    if descriptor is None or descriptor.size <= MAX_UNCOUNTED_RESPONSE_BYTES:
        manifest = await exchange.registry.get_manifest(exchange.repo, reference)
        if len(manifest.body) <= MAX_UNCOUNTED_RESPONSE_BYTES:
            exchange.pull = exchange.repo, manifest.digest  # `DistributionAPI` counts this pull after the handler
            await _send(exchange, reference, manifest)
            return
        descriptor = Descriptor(manifest.media_type, manifest.digest, len(manifest.body))
    exchange.pull = exchange.repo, descriptor.digest
    if is_not_modified(exchange, descriptor.digest):
        manifest = None  # must not stay in memory while a slow client receives the response
        await _send_unchanged(exchange, reference, descriptor.digest)
        return
    # Responses with the same manifest send the same cached bytes. With the digest as the key, the budget counts these
    # bytes only once.
    budget_share = exchange.body_memory.response_share(key=descriptor.digest)
    if not budget_share.try_grow(descriptor.size):
        manifest = None  # must not stay in memory while `hold_response` waits
    async with exchange.body_memory.hold_response(budget_share, descriptor.size):
        if manifest is None:
            manifest = await exchange.registry.get_manifest(exchange.repo, descriptor.digest)
        await _send(exchange, reference, manifest)


async def _send(exchange: Exchange, reference: Reference, manifest: Manifest) -> None:
    """Sends the manifest, or 304 if the request says that the client has it already."""
    if is_not_modified(exchange, manifest.digest):
        await _send_unchanged(exchange, reference, manifest.digest)
        return
    headers = _headers(exchange, reference, manifest.digest)
    await exchange.send_whole(200, manifest.body, (b"content-type", manifest.media_type.encode("ascii")), *headers)


async def _send_unchanged(exchange: Exchange, reference: Reference, digest: Digest) -> None:
    """Sends 304 Not Modified, which tells the client to use the manifest that it has."""
    await exchange.send_empty(304, *_headers(exchange, reference, digest))


def _headers(exchange: Exchange, reference: Reference, digest: Digest) -> list[Header]:
    """Returns the headers of a response with a manifest, except Content-Type and Content-Length. `reference`: the tag
    or digest in the request. If `reference` is a digest, the headers let the client cache the manifest without
    revalidation."""
    caching = IMMUTABLE if isinstance(reference, Digest) else REVALIDATE
    return [*content_headers(digest), caching, *warning_headers(exchange.notice)]


async def head_manifest(exchange: Exchange) -> None:
    """Answers a HEAD: sends the headers of a manifest, such as its type, length and digest."""
    reference = as_reference(exchange.resource_id)
    descriptor: Descriptor = await exchange.registry.resolve_manifest(exchange.repo, reference)
    exchange.pull = exchange.repo, descriptor.digest
    if is_not_modified(exchange, descriptor.digest):
        await _send_unchanged(exchange, reference, descriptor.digest)
        return
    content_type = (b"content-type", descriptor.media_type.encode("ascii"))
    headers = _headers(exchange, reference, descriptor.digest)
    await exchange.send_head(200, [content_type, (b"content-length", b"%d" % descriptor.size), *headers])
    await exchange.send_part(b"")


async def put_manifest(exchange: Exchange) -> None:
    """Stores a manifest under the tag or digest in the path, and under the tags in the query. The Location header of
    the response has the manifest's digest."""
    reference = as_reference(exchange.resource_id)
    query_tags = _read_query_tags(exchange)
    condition = read_put_condition(exchange)
    media_type = _read_media_type(exchange)
    expected = reference if isinstance(reference, Digest) else None
    max_bytes = exchange.limits.manifest_bytes
    small_body: bytes | None = None
    if max_bytes >= SMALL_BODY_BYTES:  # no small body exceeds the limit for manifests
        small_body = exchange.body_memory.take_small_body(exchange)
    if small_body is not None:
        parsed = Manifest.parse(small_body, media_type, expected)
        headers = await _store(exchange, parsed, reference, query_tags, condition)
    else:
        receiving = exchange.body_memory.receive_body(exchange, max_bytes, lambda: _size_error(exchange, max_bytes))
        async with receiving as body:
            manifest = await _parse(exchange, body, media_type, expected)
            headers = await _store(exchange, manifest, reference, query_tags, condition)
            del body, manifest  # both refer to the received bytes, which the budget does not count after this block
    # Sends the response after the block, so that the manifest of a slow client does not stay in the budget.
    await exchange.send_empty(201, *headers)


async def _parse(exchange: Exchange, body: bytes, media_type: str | None, expected: Digest | None) -> Manifest:
    """Returns the parsed manifest. `expected`: the digest that the manifest must have; None: any digest. Raises
    ManifestInvalid. Raises DigestInvalid if the manifest does not have the digest `expected`.

    A worker parses only one large manifest at a time, because parsing needs up to three times the manifest's size in
    memory."""
    if len(body) <= _MAX_PARSED_ON_LOOP_BYTES:
        return Manifest.parse(body, media_type, expected)
    return await exchange.body_memory.run_one_at_a_time(
        exchange, lambda: asyncio.to_thread(Manifest.parse, body, media_type, expected)
    )


async def _store(
    exchange: Exchange, manifest: Manifest, reference: Reference, query_tags: list[Tag], condition: Condition | None
) -> list[Header]:
    """Stores the manifest and returns the headers of the response. `condition`: from If-Match or If-None-Match; None:
    the request has neither. Raises PreconditionFailed if the condition does not hold, and the errors of
    `Registry.put_manifest`."""
    tags = query_tags
    if isinstance(reference, Tag):
        tags = [reference, *(tag for tag in query_tags if tag != reference)]
    elif condition is not None:
        await _check_condition_on_digest(exchange, reference, condition)
        condition = None
    stored = await exchange.registry.put_manifest(exchange.repo, manifest, tags, by=exchange.actor, condition=condition)
    headers = [(b"location", exchange.location("manifests", stored.digest)), *content_headers(stored.digest)]
    if query_tags:
        headers += [(b"oci-tag", tag.encode("ascii")) for tag in query_tags]
    if manifest.subject:
        headers.append((b"oci-subject", manifest.subject.encode("ascii")))
    return headers


async def delete_manifest(exchange: Exchange) -> None:
    """If the path has a digest, deletes the manifest with this digest and all its tags. If the path has a tag, deletes
    only this tag."""
    reference = as_reference(exchange.resource_id)
    if isinstance(reference, Digest):
        await exchange.registry.delete_manifest(exchange.repo, reference, by=exchange.actor)
    else:
        await exchange.registry.delete_tag(exchange.repo, reference, by=exchange.actor)
    await exchange.send_empty(202)


def _read_media_type(exchange: Exchange) -> str | None:
    """Returns the media type in Content-Type, without parameters. Returns None if the request has no Content-Type.
    Raises ManifestInvalid if the request has several types, or its type is not ASCII text."""
    types = {value.partition(b";")[0].strip(b" \t") for value in exchange.headers(b"content-type")}
    if len(types) > 1:
        raise ManifestInvalid("the request has more than one Content-Type")
    try:
        return types.pop().decode("ascii") if types else None
    except UnicodeDecodeError:
        raise ManifestInvalid("Content-Type is not ASCII text") from None


def _read_query_tags(exchange: Exchange) -> list[Tag]:
    """Returns the values of the query parameter `tag`, without repetitions. Raises TagInvalid if a value is not a tag.
    Raises TooManyTags if there are more than `tags_per_put` values."""
    names = exchange.query.all("tag")
    if len(names) > exchange.limits.tags_per_put:
        raise TooManyTags(f"{len(names)} tags in one request; at most {exchange.limits.tags_per_put} are accepted")
    return list(dict.fromkeys(map(Tag, names)))


def _size_error(exchange: Exchange, max_bytes: int) -> ManifestTooLarge:
    if exchange.length is None:
        return ManifestTooLarge(
            f"the manifest has more than {max_bytes} bytes, the largest size that this registry accepts"
        )
    return ManifestTooLarge(f"the manifest has {exchange.length} bytes; this registry accepts at most {max_bytes}")


async def _check_condition_on_digest(exchange: Exchange, digest: Digest, condition: Condition) -> None:
    """Checks the condition of a PUT by digest. Raises PreconditionFailed if the condition does not hold.

    A PUT by digest cannot overwrite content that another client has just stored. So the check need not be in the
    transaction that stores the manifest."""
    try:
        current: Digest | None = (await exchange.registry.resolve_manifest(exchange.repo, digest)).digest
    except ManifestUnknown:
        current = None
    if not condition.holds(current):
        raise PreconditionFailed("the condition in If-Match or If-None-Match does not hold for this manifest")
