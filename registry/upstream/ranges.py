"""Parts of a blob: what to ask for, and whether an answer brings just that (RFC 9110, 14)."""

from __future__ import annotations

import re

from urllib3 import HTTPResponse

from registry.mirror.source import RangesUnsupported
from registry.upstream.addresses import place
from registry.upstream.answers import as_count
from storage.content import Span
from storage.errors import RangeInvalid, UpstreamUnavailable

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


def range_of(span: Span) -> str | None:
    """The `Range` to send (RFC 9110, 14.1.2); None: the whole blob is wanted."""
    if span.start < 0:
        return f"bytes={span.start}"
    if span.start == 0 and not span.stop:
        return None
    return f"bytes={span.start}-{'' if span.stop is None else span.stop - 1}"


def span_of(response: HTTPResponse, span: Span, url: str) -> tuple[int, int, int]:
    """Start and stop of what the response brings, and the blob's size. Raises RangesUnsupported, UpstreamUnavailable:
    it is not what was asked for."""
    where = place(url)
    if response.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise UpstreamUnavailable(f"{where} compresses the blob, which was not asked for")
    if response.status == 206:
        told = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", "").strip())
        if told is None:
            raise UpstreamUnavailable(f"{where} sends a part of the blob without saying which")
        start, stop, size = int(told[1]), int(told[2]) + 1, int(told[3])
        length = as_count(response.headers.get("content-length"))
    else:
        length = as_count(response.headers.get("content-length"))
        if length is None:
            raise UpstreamUnavailable(f"{where} does not say how long the blob is")
        if span.start != 0 or (span.stop is not None and span.stop < length):
            raise RangesUnsupported
        start, stop, size = 0, length, length
    try:
        wanted = span.within(size) if size or span.start or span.stop else (0, 0)
    except RangeInvalid:
        wanted = (-1, -1)
    if (start, stop) != wanted or stop > size or (response.status == 206 and length not in (None, stop - start)):
        raise UpstreamUnavailable(f"{where} sends another part of the blob than the one asked for")
    return start, stop, size
