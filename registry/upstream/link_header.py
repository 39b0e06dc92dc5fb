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
"""The `rel` parameter of a link, with or without quotes."""


def next_page_url(headers: Mapping[str, str], url: str) -> str | None:
    """Returns the URL of the next page. `headers`: the headers of the response from `url`. Returns None if the `Link`
    header is missing or has no link to a next page.

    The returned URL has the path and the query of the link, but the origin of `url`. The login must not be sent to
    another origin, and a registry behind a proxy may put its internal origin into the link.

    Raises UpstreamUnavailable if the header has more than MAX_URL_LENGTH characters, or if the link to the next page is
    not valid. If this function returned None instead, the list would be incomplete without notice."""
    link_field = headers.get("link", "")
    if len(link_field) > MAX_URL_LENGTH:
        raise UpstreamUnavailable(
            f"{loggable_origin(url)} answers with a Link of more than {MAX_URL_LENGTH} characters"
        )
    for link in _LINK.finditer(link_field):
        relation = _RELATION.search(link[2])
        if relation is None or "next" not in (relation[1] or relation[2] or "").lower().split():
            continue
        try:
            return _resolve_on_origin(url, link[1].strip())
        except ValueError as error:
            message = f"{loggable_origin(url)} answers with an invalid Link to the next page: {error}"
            raise UpstreamUnavailable(message) from None
    return None


def _resolve_on_origin(url: str, link: str) -> str:
    """Resolves `link` relative to `url`. Returns a URL with the origin of `url`, and the path and query of the result.
    Raises ValueError, with a text that says what is wrong with the link.

    In the returned URL, the path follows the host directly. So a path that does not begin with `/` could change the
    host. For example, the link `x:.evil.test/p` has the path `.evil.test/p`. The origin `https://far.test` and this
    path would give the URL `https://far.test.evil.test/p`."""
    base = urlsplit(url)
    try:
        target = urlsplit(urljoin(url, link))
    except ValueError:
        raise ValueError("it is not a URL") from None
    if not target.path.startswith("/"):
        raise ValueError("its path does not begin with /")
    next_url = f"{base.scheme}://{base.netloc}{target.path}" + (f"?{target.query}" if target.query else "")
    if origin(next_url) != origin(url):
        raise ValueError("it leads to another server")
    return next_url
