"""Lists in pages: `Link` (RFC 8288), and cutting our own page out of a whole list."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

from registry.upstream.addresses import LONGEST, place
from storage.content import Page
from storage.errors import UpstreamUnavailable

T = TypeVar("T")

PAGES = 500
"""Followed at the most, for one list."""

_LINK = re.compile(r"<([^<>]*)>((?:[^<\"]|\"[^\"]*\")*)")
_REL = re.compile(r";\s*rel\s*=\s*(?:\"([^\"]*)\"|([^\s;,]+))", re.IGNORECASE)


def next_page(headers: Mapping[str, str], url: str) -> str | None:
    """The address of the next page; None: that was the last. Always on the origin of `url`: a registry behind a proxy
    may write another one, and the token must not follow it. Raises UpstreamUnavailable: the field is too long."""
    if len(headers.get("link", "")) > LONGEST:
        raise UpstreamUnavailable(f"{place(url)} answers with a Link of more than {LONGEST} characters")
    for link in _LINK.finditer(headers.get("link", "")):
        relation = _REL.search(link[2])
        if relation is None or "next" not in (relation[1] or relation[2] or "").lower().split():
            continue
        base = urlsplit(url)
        try:
            found = urlsplit(urljoin(url, link[1].strip()))
        except ValueError:
            return None
        return f"{base.scheme}://{base.netloc}{found.path}" + (f"?{found.query}" if found.query else "")
    return None


def cut(items: Sequence[T], key: Callable[[T], str], after: str | None, limit: int) -> Page[T]:
    """The page strictly after `after` of what is sorted by `key`, in byte order."""
    start = 0
    if after is not None:
        start = bisect_right(items, after.encode(errors="surrogatepass"), key=lambda item: key(item).encode())
    return Page(items[start : start + limit], len(items) > start + limit)
