"""Parses If-Match and If-None-Match (RFC 9110, 13.1). The entity tag of content is its digest in quotes.

Text that is no entity tag matches nothing in a GET or HEAD. A PUT with such text is refused, because the client relies
on the condition to protect content from being overwritten.
"""

from __future__ import annotations

import re

from registry.http.exchange import Exchange
from registry.request import RequestInvalid
from storage.content import Condition
from storage.errors import PreconditionFailed
from storage.names import Digest

_ENTITY_TAG = re.compile(rb'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
_ANY: frozenset[str] = frozenset()
"""What `_entity_tags` returns for the header value `*`, which matches any content."""
_MATCHES_NOTHING = frozenset({""})
"""What `_entity_tags` returns for a header without a usable entity tag. The empty string in this set is never a digest.
An empty set would mean `_ANY`."""


def has_read_condition(exchange: Exchange) -> bool:
    """Returns True if the request has one of: If-Match; If-None-Match; Range together with If-Range. The response to a
    GET then depends on the content's entity tag."""
    if exchange.header(b"if-none-match") is not None or exchange.header(b"if-match") is not None:
        return True
    return exchange.header(b"range") is not None and exchange.header(b"if-range") is not None


def is_not_modified(exchange: Exchange, etag_digest: Digest | None) -> bool:
    """Returns whether to answer a GET or HEAD with 304, because If-None-Match shows that the client already has the
    content (RFC 9110, 13.1.2). Raises PreconditionFailed if If-Match lists entity tags and none of them matches.

    `etag_digest`: the digest that is the content's entity tag. None: the content has no entity tag, so If-None-Match
    never matches, and If-Match matches only if its value is `*`."""
    required_tags = _entity_tags(exchange, b"if-match", accept_weak=False, refuse_invalid=False)
    # `*` (`_ANY`, which is empty) requires only that the content exists, and it does.
    if required_tags and (etag_digest is None or etag_digest not in required_tags):
        raise PreconditionFailed("If-Match does not list the entity tag of this content")
    cached_tags = _entity_tags(exchange, b"if-none-match", accept_weak=True, refuse_invalid=False)
    return cached_tags is not None and etag_digest is not None and (cached_tags == _ANY or etag_digest in cached_tags)


def read_put_condition(exchange: Exchange) -> Condition | None:
    """Returns the condition that If-Match or If-None-Match states for a PUT. Returns None if the request has neither
    header. Raises RequestInvalid if the request has both headers, or if a header has text that is no entity tag."""
    required = _entity_tags(exchange, b"if-match", accept_weak=False, refuse_invalid=True)
    excluded = _entity_tags(exchange, b"if-none-match", accept_weak=True, refuse_invalid=True)
    if required is not None and excluded is not None:
        raise RequestInvalid("the request has both If-Match and If-None-Match; send only one of them")
    if required is not None:
        return Condition(required)
    return None if excluded is None else Condition(excluded, negated=True)


def _entity_tags(
    exchange: Exchange, header: bytes, *, accept_weak: bool, refuse_invalid: bool
) -> frozenset[str] | None:
    """Returns the entity tags in a conditional header (RFC 9110, 8.8.3), without their quotes.

    Returns `_ANY` for `*`, `_MATCHES_NOTHING` if no tag can be used, and None if the request does not have the header.
    `accept_weak`: if False, leaves out weak tags, such as `W/"sha256:…"`. `refuse_invalid`: if True, raises
    RequestInvalid for text that is no entity tag; if False, leaves this text out."""
    values = exchange.headers(header)
    if not values:
        return None
    text = b",".join(values).strip(b" \t")
    if text == b"*":
        return _ANY
    matches = [_ENTITY_TAG.fullmatch(part) for raw in text.split(b",") if (part := raw.strip(b" \t"))]
    if refuse_invalid and not (matches and all(matches)):
        raise RequestInvalid(f"{header.decode()} must be '*' or a list of entity tags in quotes")
    tags = {match[2].decode("latin-1") for match in matches if match and (accept_weak or not match[1])}
    return frozenset(tags) or _MATCHES_NOTHING
