"""Parses request headers: Range and If-Range of a blob GET, and Content-Range of an uploaded chunk.

An invalid Range is ignored, as RFC 9110, 14.2 allows. An invalid Content-Range is refused: if it were ignored, the
chunk could be stored at a wrong offset.
"""

from __future__ import annotations

import re

from registry.http.exchange import Exchange
from registry.request import RequestInvalid
from storage.content import Span
from storage.errors import BlobUploadInvalid, SizeInvalid
from storage.names import Digest

_RANGE_HEADER = re.compile(rb"bytes[ \t]*=(.*)", re.IGNORECASE | re.DOTALL)
_RANGE = re.compile(rb"([0-9]*)-([0-9]*)")
_CONTENT_RANGE = re.compile(rb"([0-9]+)-([0-9]+)")
_BEYOND_ANY_BLOB = 10**18
"""A byte position that is larger than any blob. `_number` returns this position for numbers with more than 18
digits."""


def read_ranges(exchange: Exchange, etag_digest: Digest | None) -> list[Span] | None:
    """Returns the spans (parts of the blob) that the Range header requests (RFC 9110, 14.2).

    Returns None if the response has to contain the whole blob:
    - The request has no Range header, or several.
    - The unit of Range is not bytes, or Range cannot be parsed.
    - The value of If-Range is not the blob's entity tag, which is `etag_digest` in quotes.
    - The request has If-Range, and `etag_digest` is None because the blob has no entity tag.

    A returned span may end before it starts. Opening the blob with such a span raises RangeInvalid (416). Raises
    RequestInvalid if Range has more than `RequestLimits.ranges_per_request` ranges."""
    values = exchange.headers(b"range")
    if len(values) != 1 or not (header := _RANGE_HEADER.fullmatch(values[0])):
        return None
    if_range = exchange.header(b"if-range")
    if if_range is not None and (etag_digest is None or if_range.strip() != b'"%b"' % etag_digest.encode()):
        return None
    range_texts = [text for part in header[1].split(b",") if (text := part.strip(b" \t"))]
    limit = exchange.limits.ranges_per_request
    if len(range_texts) > limit:
        raise RequestInvalid(f"{len(range_texts)} ranges in one request; at most {limit} are accepted")
    spans = []
    for text in range_texts:
        numbers = _RANGE.fullmatch(text)
        if numbers is None or text == b"-":
            return None
        spans.append(_span(numbers[1], numbers[2]))
    return spans or None


def _span(first: bytes, last: bytes) -> Span:
    """Returns the span of one range. `first`: the digits before the '-'. `last`: the digits after it. Either may be
    empty."""
    if not first:  # `-500`: the last 500 bytes
        length = _number(last)  # 0 for `-0`, which asks for no bytes
        return Span(-length) if length else Span(0, 0)
    return Span(_number(first), _number(last) + 1 if last else None)


def read_content_range(exchange: Exchange) -> tuple[int, int] | None:
    """Reads Content-Range, and returns the offset of the uploaded chunk and its length in bytes. In the OCI spec, this
    header has no unit: `0-99` means the first 100 bytes.

    Returns None if the request has no Content-Range. The chunk then follows the bytes that the session has stored.
    Raises BlobUploadInvalid if Content-Range is invalid. Raises SizeInvalid if its length differs from
    Content-Length."""
    values = exchange.headers(b"content-range")
    if not values:
        return None
    positions = _CONTENT_RANGE.fullmatch(values[0]) if len(values) == 1 else None
    if positions is None:
        raise BlobUploadInvalid("Content-Range is not two byte positions like 0-1023")
    first, last = _number(positions[1]), _number(positions[2])
    if last < first or last >= _BEYOND_ANY_BLOB:
        raise BlobUploadInvalid("Content-Range ends before it starts, or lies beyond any blob")
    length = last - first + 1
    if exchange.length is not None and exchange.length != length:
        raise SizeInvalid(f"Content-Range declares {length} bytes, Content-Length {exchange.length}")
    return first, length


def _number(digits: bytes) -> int:
    """Converts `digits` to a number. Returns `_BEYOND_ANY_BLOB` for more than 18 digits."""
    return int(digits) if len(digits) <= 18 else _BEYOND_ANY_BLOB
