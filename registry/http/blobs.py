"""Handlers of blobs: GET of a whole blob or of ranges, HEAD, DELETE (OCI distribution spec, end-2, end-10; RFC 9110,
section 14).

A *span* is a part of a blob; HTTP calls it a range.

An *incomplete* blob is one that a mirror is still downloading from its upstream. The mirror passes the bytes on as they
arrive. It can compare them with the digest only after the last byte, so an incomplete blob has no entity tag. If the
remaining bytes of an incomplete blob cannot be sent, the handlers raise PartialBlobLost.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing, closing, suppress
from typing import Final, NamedTuple

from registry.asgi import Message
from registry.http.conditional_headers import has_read_condition, is_not_modified
from registry.http.disconnect import DisconnectWatch
from registry.http.exchange import Exchange
from registry.http.range_headers import read_ranges
from registry.http.response_headers import OCTET_STREAM, blob_headers
from storage.content import Descriptor, OpenFile, Span
from storage.errors import PartialBlobLost, RangeInvalid
from storage.interface import BlobReader
from storage.names import Digest

_ZERO_COPY: Final = "http.response.zerocopysend"
"""The ASGI extension for sending a part of an open file. Its messages have this `type`."""
_RANGES_BEFORE_PAUSE: Final = 16
"""A response pauses after this many ranges, so that the event loop can run other tasks. Without pauses, a request for
1,024 ranges (the most that are allowed) would block the loop for 100 ms."""


async def head_blob(exchange: Exchange) -> None:
    """Sends the headers of a blob. Ignores Range, which has a meaning only in a GET (RFC 9110, 14.2)."""
    digest = Digest(exchange.resource_id)
    descriptor = await exchange.registry.resolve_blob(exchange.repo, digest)
    headers = blob_headers(digest, verified=descriptor.verified)
    if is_not_modified(exchange, _etag_digest(descriptor)):
        await exchange.send_empty(304, *headers)
        return
    await exchange.send_head(200, [OCTET_STREAM, (b"content-length", b"%d" % descriptor.size), *headers])
    await exchange.send_part(b"")


async def get_blob(exchange: Exchange) -> None:
    """Sends the whole blob, one range of it, or several ranges as a multipart body."""
    digest = Digest(exchange.resource_id)
    etag_digest: Digest | None = digest
    is_conditional = has_read_condition(exchange)
    if is_conditional:
        etag_digest = _etag_digest(await exchange.registry.resolve_blob(exchange.repo, digest))
        if is_not_modified(exchange, etag_digest):
            # `is_not_modified` is True only for a blob with an entity tag, and only a verified blob has one.
            await exchange.send_empty(304, *blob_headers(digest, verified=True))
            return
    spans = read_ranges(exchange, etag_digest)
    if spans and len(spans) > 1:
        spans = await _satisfiable_spans(exchange, digest, spans)
        if len(spans) > 1:
            if await _send_multipart(exchange, digest, spans):
                return
            spans = None
    # If `spans` is empty or None, the response has the whole blob.
    reader = await exchange.registry.open_blob(exchange.repo, digest, spans[0] if spans else None)
    try:
        if is_conditional and spans and etag_digest is not None and reader.is_incomplete:
            # The blob was deleted after the condition was checked, and the mirror downloads it again. The new bytes are
            # not verified yet. The client must not append unverified bytes to those that it has already.
            raise PartialBlobLost(
                "the blob was removed from this registry while the request was being answered; try again"
            )
        await _send_span(exchange, reader, is_range=bool(spans))
    finally:
        await reader.aclose()


async def delete_blob(exchange: Exchange) -> None:
    """Deletes a blob from the repository. Other repositories that have the blob keep it."""
    await exchange.registry.delete_blob(exchange.repo, Digest(exchange.resource_id), by=exchange.actor)
    await exchange.send_empty(202)


def _etag_digest(descriptor: Descriptor) -> Digest | None:
    """Returns the digest that is the blob's entity tag; None while the blob has not been verified."""
    return descriptor.digest if descriptor.verified else None


async def _send_span(exchange: Exchange, reader: BlobReader, *, is_range: bool) -> None:
    """Sends the span of the blob that `reader` reads. `is_range`: True if the client requested a range; the status is
    then 206. False if the span is the whole blob; the status is then 200."""
    start, stop = reader.span
    size = reader.descriptor.size
    identity_headers = blob_headers(reader.descriptor.digest, verified=not reader.is_incomplete)
    headers = [OCTET_STREAM, (b"content-length", b"%d" % (stop - start)), *identity_headers]
    if is_range:
        headers.append((b"content-range", _content_range(start, stop, size)))
    await exchange.send_head(206 if is_range else 200, headers)
    if reader.data is not None:  # the span is short, and `open_blob` has read all its bytes
        await exchange.send_part(reader.data)
        return
    if reader.is_incomplete and start < stop:
        # The empty part makes the server send the headers now. Otherwise, the server would send the headers together
        # with the first bytes from the upstream, and a client might time out before these bytes arrive.
        await exchange.send_part(b"", more=True)
    with closing(DisconnectWatch(exchange.wait_disconnected)) as watch:
        await _send_stream(exchange, _read_parts(exchange, reader, watch), stop - start, watch)


async def _satisfiable_spans(exchange: Exchange, digest: Digest, spans: list[Span]) -> list[Span]:
    """Returns the *satisfiable* spans: those of `spans` that have bytes in the blob. Keeps their order. Shortens a span
    that goes beyond the end of the blob. In every returned span, `start` is not negative and `stop` is not None. Does
    not merge spans: a client expects one part in the response for each range that it requested.

    Returns an empty list if the satisfiable spans together are longer than the blob. The caller then sends the whole
    blob, so that overlapping ranges cost no more than the blob itself (RFC 9110, 14.2 and 17.15). Raises BlobUnknown.
    Raises RangeInvalid if no span is satisfiable."""
    size = (await exchange.registry.resolve_blob(exchange.repo, digest)).size
    satisfiable_spans = []
    for span in spans:
        with suppress(RangeInvalid):  # the span has no bytes in the blob
            satisfiable_spans.append(Span(*span.to_offsets(size)))
    if not satisfiable_spans:
        raise RangeInvalid(f"the blob has {size} bytes; the requested ranges contain none of them", size=size)
    return satisfiable_spans if sum((span.stop or 0) - span.start for span in satisfiable_spans) <= size else []


def _is_passed_through(reader: BlobReader) -> bool:
    """Returns whether the mirror downloads the blob for `reader` alone. The mirror does this if the disk is too full to
    store the blob. Each further reader of the blob needs another download."""
    return reader.is_incomplete and reader.file is None


async def _send_multipart(exchange: Exchange, digest: Digest, spans: list[Span]) -> bool:
    """Sends several spans as `multipart/byteranges` (RFC 9110, 14.6), and returns True. `spans`: a result of
    `_satisfiable_spans`. If `_is_passed_through` is true, each span would need another download. In this case, sends
    nothing and returns False, and the caller sends the whole blob instead (RFC 9110, 14.2 allows this).

    Opens the first span before it sends the status, so an error of the first span gets an error response. An error of a
    later span ends the response early, and the server closes the connection."""
    reader = await exchange.registry.open_blob(exchange.repo, digest, spans[0])
    if _is_passed_through(reader):
        await reader.aclose()
        return False
    size = reader.descriptor.size
    boundary = secrets.token_hex(16).encode("ascii")
    part_heads = [_part_head(boundary, span, size) for span in spans]
    tail = b"\r\n--%b--\r\n" % boundary
    length = sum(map(len, part_heads)) + sum((span.stop or 0) - span.start for span in spans) + len(tail)
    content_type = (b"content-type", b"multipart/byteranges; boundary=" + boundary)

    async def body_parts() -> AsyncGenerator[BodyPart, None]:
        part_reader = reader  # the reader of the first span
        for index, (part_head, span) in enumerate(zip(part_heads, spans, strict=True)):
            if index:
                if index % _RANGES_BEFORE_PAUSE == 0:
                    await asyncio.sleep(0)
                # Opening the blob may take long: a mirror may wait for its upstream.
                opening = exchange.registry.open_blob(exchange.repo, digest, span)
                part_reader = await watch.cancel_on_disconnect(opening)
            async with aclosing(part_reader):
                if part_reader.is_incomplete and (not reader.is_incomplete or _is_passed_through(part_reader)):
                    # After the first part was sent, one of two things happened. The blob was deleted, and the mirror
                    # downloads it again, maybe with other bytes. Or the disk became full: see `_is_passed_through`.
                    raise PartialBlobLost(
                        "the blob was removed from this registry, or the registry's disk became full, after the first "
                        "part was sent; try again"
                    )
                yield part_head
                async for part in _read_parts(exchange, part_reader, watch):
                    yield part
        yield tail

    with closing(DisconnectWatch(exchange.wait_disconnected)) as watch:
        async with aclosing(reader), aclosing(body_parts()) as stream:
            identity_headers = blob_headers(digest, verified=not reader.is_incomplete)
            await exchange.send_head(206, [content_type, (b"content-length", b"%d" % length), *identity_headers])
            await _send_stream(exchange, stream, length, watch)
    return True


def _part_head(boundary: bytes, span: Span, size: int) -> bytes:
    """Returns the boundary and the headers that precede the part with `span` in a multipart body. `size`: the size of
    the whole blob."""
    return b"\r\n--%b\r\ncontent-type: %b\r\ncontent-range: %b\r\n\r\n" % (
        boundary,
        OCTET_STREAM[1],
        _content_range(span.start, span.stop or size, size),
    )


def _content_range(start: int, stop: int, size: int) -> bytes:
    """Returns the value of Content-Range for the bytes from `start` up to, but not including, `stop`."""
    return b"bytes %d-%d/%d" % (start, stop - 1, size)


class FilePart(NamedTuple):
    """A part of a response's body that the server sends directly from an open file. The part has `length` bytes, and
    begins at the offset `start` of the blob."""

    file: OpenFile
    start: int
    length: int


BodyPart = bytes | FilePart


async def _read_parts(exchange: Exchange, reader: BlobReader, watch: DisconnectWatch) -> AsyncGenerator[BodyPart, None]:
    """Yields the parts of the span that `reader` reads: `FilePart`s if the blob is in a file and the server can send
    files (`_ZERO_COPY`); bytes otherwise. If the blob is incomplete, waits until the bytes of each part have arrived
    from the upstream. Raises ClientGone if the client disconnects during this wait."""
    file = reader.file
    if file is not None and _ZERO_COPY in exchange.scope.get("extensions", ()):
        offset, stop = reader.span
        while offset < stop:
            # Waits until the byte at `offset` is in the file. Then all bytes before `ready_end` are in the file.
            ready_end = await watch.cancel_on_disconnect(reader.readable_until(offset))
            yield FilePart(file, offset, ready_end - offset)
            offset = ready_end
    else:
        parts = aiter(reader)
        while (data := await watch.cancel_on_disconnect(anext(parts, None))) is not None:
            yield data


async def _send_stream(
    exchange: Exchange, stream: AsyncIterable[BodyPart], length: int, watch: DisconnectWatch
) -> None:
    """Sends the parts of `stream` as the body of the response. `length`: total number of bytes of the parts.

    Before each part except the first, checks whether the client has disconnected, because some ASGI servers do not
    report this when they send. The first check starts a task that waits until the client disconnects. A response of
    one part has no check, so it does not need the task. Raises ClientGone, and the errors of reading the blob. After an
    error, the server closes the connection, because the body is shorter than its Content-Length."""
    is_first = True
    remaining_bytes = length
    async for part in stream:
        if not is_first:
            watch.check()
        is_first = False
        remaining_bytes -= part.length if isinstance(part, FilePart) else len(part)
        await _send_body_part(exchange, part, more=remaining_bytes > 0)
    if not length:  # the stream had no parts, so the end of the response has not been sent yet
        await exchange.send_part(b"")


async def _send_body_part(exchange: Exchange, part: BodyPart, *, more: bool) -> None:
    """Sends one part of the body. `more`: whether further parts follow."""
    if isinstance(part, bytes):
        await exchange.send_part(part, more=more)
        return
    file, start, length = part
    message: Message = {"type": _ZERO_COPY, "file": file, "offset": file.offset + start, "count": length}
    await exchange.send({**message, "more_body": more})
