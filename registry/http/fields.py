"""Parses header fields and parameters: strictly where a mistake would damage content, leniently where RFC 9110 says
so."""

from __future__ import annotations

import re

from registry.http.exchange import Exchange
from registry.request import RequestInvalid
from storage.content import Condition, Span
from storage.errors import BlobUploadInvalid, DigestInvalid, ManifestInvalid, PreconditionFailed, SizeInvalid
from storage.names import Digest, shown

_RANGES = re.compile(rb"bytes[ \t]*=(.*)", re.IGNORECASE | re.DOTALL)
_RANGE = re.compile(rb"([0-9]*)-([0-9]*)")
_CONTENT_RANGE = re.compile(rb"([0-9]+)-([0-9]+)")
_ENTITY_TAG = re.compile(rb'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
_COUNT = re.compile(r"[0-9]{1,18}")
_MATCHES_NOTHING = frozenset({""})
"""A set that contains no digest. An empty set would mean any digest."""
_BEYOND_ANY_BLOB = 10**18
"""A position beyond any blob. A number with more digits is replaced by it."""


def _number(digits: bytes) -> int:
    return int(digits) if len(digits) <= 18 else _BEYOND_ANY_BLOB


def read_ranges(exchange: Exchange, digest: Digest | None) -> list[Span] | None:
    """Returns the spans of the Range header (RFC 9110, 14.2). None: the whole content, as there is no Range, If-Range
    does not hold, or the Range has another unit or cannot be parsed. A span that ends before it starts is kept: opening
    it answers 416. `digest`: the content's validator; None: it has none, so no If-Range holds. Raises RequestInvalid
    for more ranges than one request may have."""
    fields = exchange.headers(b"range")
    if len(fields) != 1 or not (given := _RANGES.fullmatch(fields[0])):
        return None
    validator = exchange.header(b"if-range")
    if validator is not None and (digest is None or validator.strip() != b'"%b"' % digest.encode()):
        return None
    specs = [spec for part in given[1].split(b",") if (spec := part.strip(b" \t"))]
    if len(specs) > exchange.limits.ranges:
        raise RequestInvalid(f"{len(specs)} ranges in one request; at most {exchange.limits.ranges} are served")
    spans = []
    for spec in specs:
        found = _RANGE.fullmatch(spec)
        if found is None or spec == b"-":
            return None
        spans.append(_span(found[1], found[2]))
    return spans or None


def _span(first: bytes, last: bytes) -> Span:
    if not first:
        length = _number(last)
        return Span(-length) if length else Span(0, 0)
    return Span(_number(first), _number(last) + 1 if last else None)


def read_content_range(exchange: Exchange) -> tuple[int, int] | None:
    """Returns a chunk's first byte and its length, from Content-Range in the form of the spec: `0-99`, both inclusive,
    no unit. None: there is none, so the chunk is the next one. Raises BlobUploadInvalid, SizeInvalid (it contradicts
    Content-Length)."""
    fields = exchange.headers(b"content-range")
    if not fields:
        return None
    found = _CONTENT_RANGE.fullmatch(fields[0]) if len(fields) == 1 else None
    if found is None:
        raise BlobUploadInvalid("Content-Range is not two byte positions like 0-1023")
    first, last = _number(found[1]), _number(found[2])
    if last < first or last >= _BEYOND_ANY_BLOB:
        raise BlobUploadInvalid("Content-Range ends before it starts, or lies beyond any blob")
    length = last - first + 1
    if exchange.length is not None and exchange.length != length:
        raise SizeInvalid(f"Content-Range declares {length} bytes, Content-Length {exchange.length}")
    return first, length


def read_digest(exchange: Exchange, name: str) -> Digest | None:
    """Returns a digest from the query; None without it. Raises DigestInvalid, also for two of them."""
    values = exchange.query.all(name)
    if len(values) > 1:
        raise DigestInvalid(f"the query gives {name} {len(values)} times; once is meant")
    return Digest(values[0]) if values else None


def read_count(exchange: Exchange) -> int | None:
    """Returns `n`, the number of entries that a page may have; None without it. Raises RequestInvalid."""
    text = exchange.query.one("n")
    if text is None:
        return None
    if not _COUNT.fullmatch(text):
        raise RequestInvalid(f"n is {shown(text)}; a count is meant, such as n=100")
    return int(text)


def read_media_type(exchange: Exchange) -> str | None:
    """Returns Content-Type without its parameters; None without it. Raises ManifestInvalid."""
    fields = {field.partition(b";")[0].strip(b" \t") for field in exchange.headers(b"content-type")}
    if len(fields) > 1:
        raise ManifestInvalid("the request has more than one Content-Type")
    try:
        return fields.pop().decode("ascii") if fields else None
    except UnicodeDecodeError:
        raise ManifestInvalid("Content-Type is not ASCII text") from None


def _entity_tags(exchange: Exchange, name: bytes, *, weak: bool, strict: bool) -> frozenset[str] | None:
    """Returns the entity tags of a conditional header (RFC 9110, 8.8.3); empty for `*`, None without the header.
    `weak`: weak tags count as well. Text that is no entity tag matches nothing; `strict`: it raises RequestInvalid."""
    fields = exchange.headers(name)
    if not fields:
        return None
    text = b",".join(fields).strip(b" \t")
    if text == b"*":
        return frozenset()
    found = [_ENTITY_TAG.fullmatch(part) for raw in text.split(b",") if (part := raw.strip(b" \t"))]
    if strict and not (found and all(found)):
        raise RequestInvalid(f"{name.decode()} is not '*' and not a list of quoted entity tags")
    listed = {tag[2].decode("latin-1") for tag in found if tag and (weak or not tag[1])}
    return frozenset(listed) or _MATCHES_NOTHING


def is_conditional(exchange: Exchange) -> bool:
    """Returns whether the answer to a GET depends on the content's validator (RFC 9110, 13.1)."""
    if exchange.header(b"if-none-match") is not None or exchange.header(b"if-match") is not None:
        return True
    return exchange.header(b"range") is not None and exchange.header(b"if-range") is not None


def not_modified(exchange: Exchange, digest: Digest | None) -> bool:
    """Returns whether the client has this content already (RFC 9110, 13.1.2). `digest`: the content's validator; None:
    it has none, so no tag of the client matches. Raises PreconditionFailed: If-Match names other content, or there is
    no validator."""
    wanted = _entity_tags(exchange, b"if-match", weak=False, strict=False)
    if wanted and (digest is None or digest not in wanted):
        raise PreconditionFailed("If-Match names other content than this")
    had = _entity_tags(exchange, b"if-none-match", weak=True, strict=False)
    return had is not None and digest is not None and (not had or digest in had)


def read_condition(exchange: Exchange) -> Condition | None:
    """Returns the condition that If-Match or If-None-Match puts on a PUT; None without them. Raises RequestInvalid."""
    wanted = _entity_tags(exchange, b"if-match", weak=False, strict=True)
    unwanted = _entity_tags(exchange, b"if-none-match", weak=True, strict=True)
    if wanted is not None and unwanted is not None:
        raise RequestInvalid("If-Match and If-None-Match in one PUT; one of them is enough")
    if wanted is not None:
        return Condition(wanted)
    return None if unwanted is None else Condition(unwanted, absent=True)
