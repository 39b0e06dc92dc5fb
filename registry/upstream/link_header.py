"""Finds the next page of a list in the `Link` header of an upstream's response (`next_page_url`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urljoin, urlsplit

from registry.upstream.destinations import MAX_URL_LENGTH, loggable_origin, origin
from storage.errors import UpstreamUnavailable

_LINK = re.compile(r"<([^<>]*)>((?:[^<\"]|\"[^\"]*\")*)")
"""A link in a `Link` header (RFC 8288, section 3): its URL and the text of its parameters."""
_RELATION = re.compile(r";\s*rel\s*=\s*(?:\"([^\"]*)\"|([^\s;,]+))", re.IGNORECASE)
"""The `rel` parameter of a link, quoted or not."""


def next_page_url(headers: Mapping[str, str], url: str) -> str | None:
    """Returns the URL of the next page, from the `Link` header of a response from `url`; None if the header has no link
    to a next page. The returned URL has the path and the query from the header, and the origin of `url`. Ignores the
    origin in the header: a registry behind a proxy may name an internal origin there, and the login must not be sent to
    another origin.

    Raises UpstreamUnavailable if the header has more than MAX_URL_LENGTH characters, or if the link is not valid. If
    this function ignored such a header, the list would be incomplete without notice."""
    link_field = headers.get("link", "")
    if len(link_field) > MAX_URL_LENGTH:
        raise UpstreamUnavailable(
            f"{loggable_origin(url)} answers with a Link of more than {MAX_URL_LENGTH} characters"
        )
    for link in _LINK.finditer(link_field):
        relation = _RELATION.search(link[2])
        if relation is None or "next" not in (relation[1] or relation[2] or "").lower().split():
            continue
        next_url = _on_origin_of(url, link[1].strip())
        if next_url is None:
            raise UpstreamUnavailable(f"{loggable_origin(url)} answers with a Link whose path does not begin with /")
        return next_url
    return None


def _on_origin_of(url: str, link: str) -> str | None:
    """Returns the URL with the path and the query of `link`, which may be relative to `url`, and with the origin of
    `url`. Returns None if `link` is not valid, or if its path does not begin with `/`. Such a path could change the
    host. For example, the link `x:.evil.test/p` has the path `.evil.test/p`. Appended to `https://far.test`, the path
    gives the host `far.test.evil.test`."""
    base = urlsplit(url)
    try:
        target = urlsplit(urljoin(url, link))
        if not target.path.startswith("/"):
            return None
        next_url = f"{base.scheme}://{base.netloc}{target.path}" + (f"?{target.query}" if target.query else "")
        return next_url if origin(next_url) == origin(url) else None
    except ValueError:
        return None
