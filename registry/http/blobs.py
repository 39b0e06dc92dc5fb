"""Blobs: GET whole or in ranges, HEAD, DELETE (OCI distribution spec, end-2, end-10; RFC 9110, section 14)."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing, closing, suppress
from typing import Final, NamedTuple

from registry.http import fields
from registry.http.asgi import Message
from registry.http.disconnect import DisconnectWatch
from registry.http.exchange import Exchange
from registry.http.headers import OCTET_STREAM, blob_headers
from storage.content import Descriptor, OpenFile, Span
from storage.errors import PartialLost, RangeInvalid
from storage.interface import BlobReader
from storage.names import Digest

_ZERO_COPY: Final = "http.response.zerocopysend"
_PARTS_PER_TURN: Final = 16
"""Parts of one answer that are sent before the event loop runs other requests: 1,024 small ones take 100 ms."""


async def head_blob(exchange: Exchange) -> None:
    """Answers HEAD. Ignores Range, which is for GET alone (RFC 9110, 14.2)."""
    digest = Digest(exchange.item)
    found = await exchange.registry.resolve_blob(exchange.repo, digest)
    headers = blob_headers(digest, verified=found.verified)
    if fields.not_modified(exchange, _validator(found)):
        await exchange.send_empty(304, *headers)
        return
    await exchange.send_head(200, [OCTET_STREAM, (b"content-length", b"%d" % found.size), *headers])
    await exchange.send_part(b"")


async def get_blob(exchange: Exchange) -> None:
    """Answers GET: the whole blob, one range, or several ranges as a multipart body."""
    digest = Digest(exchange.item)
    validator: Digest | None = digest
    conditional = fields.is_conditional(exchange)
    if conditional:
        validator = _validator(await exchange.registry.resolve_blob(exchange.repo, digest))
        if fields.not_modified(exchange, validator):
            await exchange.send_empty(304, *blob_headers(digest, verified=True))
            return
    spans = fields.read_ranges(exchange, validator)
    if spans and len(spans) > 1:
        spans = await _existing_spans(exchange, digest, spans)
        if len(spans) > 1:
            await _send_parts(exchange, digest, spans)
            return
    reader = await exchange.registry.open_blob(exchange.repo, digest, spans[0] if spans else None)
    try:
        if conditional and spans and validator is not None and reader.is_incomplete:
            raise PartialLost("the blob was dropped here since its condition was looked at; try again")
        await _send_one(exchange, reader, partial=bool(spans))
    finally:
        await reader.aclose()


async def delete_blob(exchange: Exchange) -> None:
    await exchange.registry.delete_blob(exchange.repo, Digest(exchange.item), by=exchange.actor)
    await exchange.send_empty(202)


def _validator(found: Descriptor) -> Digest | None:
    """Returns the digest that conditions are compared with; None until the content has been verified."""
    return found.digest if found.verified else None


async def _send_one(exchange: Exchange, reader: BlobReader, *, partial: bool) -> None:
    start, stop = reader.span
    size = reader.descriptor.size
    known = blob_headers(reader.descriptor.digest, verified=not reader.is_incomplete)
    headers = [OCTET_STREAM, (b"content-length", b"%d" % (stop - start)), *known]
    if partial:
        headers.append((b"content-range", _content_range(start, stop, size)))
    await exchange.send_head(206 if partial else 200, headers)
    if reader.data is not None:
        await exchange.send_part(reader.data)
        return
    if reader.is_incomplete and start < stop:
        # Makes the server send the headers now: the first bytes may take longer than a client waits for headers.
        await exchange.send_part(b"", more=True)
    with closing(DisconnectWatch(exchange.wait_disconnected)) as watch:
        await _send_stream(exchange, _body_parts(exchange, reader, watch), stop - start, watch)


async def _existing_spans(exchange: Exchange, digest: Digest, spans: list[Span]) -> list[Span]:
    """Returns the spans that lie in the blob, in the requested order. Empty: the whole blob is to be sent, since
    together they are longer than the blob.

    They are not merged: clients match the parts with the ranges they requested. The bound keeps overlapping ranges from
    costing more than the blob itself (RFC 9110, 14.2 and 17.15). Raises BlobUnknown, RangeInvalid (none lies in the
    blob)."""
    size = (await exchange.registry.resolve_blob(exchange.repo, digest)).size
    inside = []
    for span in spans:
        with suppress(RangeInvalid):
            inside.append(Span(*span.to_offsets(size)))
    if not inside:
        raise RangeInvalid(f"the blob has {size} bytes; no byte of it lies in those ranges", size=size)
    return inside if sum((span.stop or 0) - span.start for span in inside) <= size else []


async def _send_parts(exchange: Exchange, digest: Digest, spans: list[Span]) -> None:
    """Sends `multipart/byteranges` (RFC 9110, 14.6). The first part is opened before the head is sent; a later one that
    fails breaks the connection."""
    reader = await exchange.registry.open_blob(exchange.repo, digest, spans[0])
    size = reader.descriptor.size
    boundary = secrets.token_hex(16).encode("ascii")
    heads = [_part_head(boundary, span, size) for span in spans]
    tail = b"\r\n--%b--\r\n" % boundary
    length = sum(map(len, heads)) + sum((span.stop or 0) - span.start for span in spans) + len(tail)
    kind = (b"content-type", b"multipart/byteranges; boundary=" + boundary)

    async def parts() -> AsyncGenerator[BodyPart, None]:
        opened = reader
        for place, (head, span) in enumerate(zip(heads, spans, strict=True)):
            if place:
                if place % _PARTS_PER_TURN == 0:
                    await asyncio.sleep(0)
                opened = await exchange.registry.open_blob(exchange.repo, digest, span)
            async with aclosing(opened):
                if opened.is_incomplete and not reader.is_incomplete:
                    raise PartialLost("the blob was dropped here after its first part was sent; try again")
                yield head
                async for part in _body_parts(exchange, opened, watch):
                    yield part
        yield tail

    with closing(DisconnectWatch(exchange.wait_disconnected)) as watch:
        async with aclosing(reader), aclosing(parts()) as stream:
            known = blob_headers(digest, verified=not reader.is_incomplete)
            await exchange.send_head(206, [kind, (b"content-length", b"%d" % length), *known])
            await _send_stream(exchange, stream, length, watch)


def _part_head(boundary: bytes, span: Span, size: int) -> bytes:
    return b"\r\n--%b\r\ncontent-type: %b\r\ncontent-range: %b\r\n\r\n" % (
        boundary,
        OCTET_STREAM[1],
        _content_range(span.start, span.stop or size, size),
    )


def _content_range(start: int, stop: int, size: int) -> bytes:
    return b"bytes %d-%d/%d" % (start, stop - 1, size)


class FilePart(NamedTuple):
    """Bytes of an open file, which the server can send without reading them."""

    file: OpenFile
    start: int
    length: int


BodyPart = bytes | FilePart


async def _body_parts(exchange: Exchange, reader: BlobReader, watch: DisconnectWatch) -> AsyncGenerator[BodyPart, None]:
    """Yields the reader's bytes; parts of its file, where it has one and the server can send files (ASGI's zero-copy
    extension). For a blob that is still being fetched, yields each part as it arrives."""
    file = reader.file
    if file is not None and _ZERO_COPY in exchange.scope.get("extensions", ()):
        at, stop = reader.span
        while at < stop:
            reach = await watch.cancel_on_disconnect(reader.readable_until(at))
            yield FilePart(file, at, reach - at)
            at = reach
    else:
        async for data in reader:
            yield data


async def _send_stream(
    exchange: Exchange, stream: AsyncIterable[BodyPart], length: int, watch: DisconnectWatch
) -> None:
    """Sends a body of `length` bytes in parts. Some servers accept data for a client that has disconnected, so the
    client is watched from the second part on. Raises ClientGone, and the errors of reading: the server then breaks the
    connection, since the body is shorter than its Content-Length."""
    first = True
    left = length
    async for part in stream:
        if not first:
            watch.check()
        first = False
        left -= part.length if isinstance(part, FilePart) else len(part)
        await _send_body_part(exchange, part, more=left > 0)
    if not length:
        await exchange.send_part(b"")


async def _send_body_part(exchange: Exchange, part: BodyPart, *, more: bool) -> None:
    if isinstance(part, bytes):
        await exchange.send_part(part, more=more)
        return
    file, start, length = part
    message: Message = {"type": _ZERO_COPY, "file": file, "offset": file.offset + start, "count": length}
    await exchange.send({**message, "more_body": more})
