"""Handlers that list tags, repositories and referrers, in pages (OCI distribution spec, "Content Discovery").

The Link header of a page has the URL of the next page. A request may have two query parameters:

- `n`: the number of entries that the client wants on a page. Ignored for referrers.
- `last`: the entry after which the page starts.

Each handler gives `exchange.body_memory.send_response` a function that makes the response. `send_response` calls the
function, sends the response, and counts a large body against the memory budget of the worker. If there is not enough
memory now, it drops the body, waits, and calls the function again.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from contextlib import closing
from typing import Final

from registry.asgi import Header
from registry.http.disconnect import DisconnectWatch
from registry.http.exchange import Exchange
from registry.http.response_headers import JSON, REVALIDATE, warning_headers
from registry.request import RequestInvalid
from storage.content import OCI_INDEX, Descriptor
from storage.names import Digest, shown

MAX_LAST_CHARACTERS: Final = 1024
"""Largest length of `last`. The name of an entry has at most 255 characters, and an encrypted cursor has at most 700
(`list_repositories`)."""
_COUNT_PATTERN = re.compile(r"[0-9]{1,18}")
"""Matches a valid `n`. All numbers with 18 digits fit into SQLite's integers."""
_INDEX_TYPE_HEADER: Header = (b"content-type", OCI_INDEX.encode())
_INDEX_HEAD = f'{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":['.encode()
_INDEX_TAIL = b"]}"
_MAX_SERIALISED_ON_LOOP = 100
"""Largest number of referrers that are serialised on the event loop. A longer list would block the loop, so a thread
serialises it."""


async def list_tags(exchange: Exchange) -> None:
    """Lists a repository's tags. With `n=0`, the list is empty, as the spec says. If the repository is unknown, sends
    404, even with `n=0`."""
    requested_count, last = _read_count(exchange), _read_last(exchange)
    max_tags = exchange.limits.tags_per_page
    limit = max_tags if requested_count is None else min(requested_count, max_tags)

    async def make_response() -> tuple[bytes, list[Header]]:
        # With `n=0`, this asks for one tag to find out whether the repository exists, and then drops the tag.
        page = await exchange.registry.tags(exchange.repo, last, max(limit, 1))
        tags = page.items[:limit]
        headers = [JSON, REVALIDATE, *warning_headers(exchange.notice)]
        if tags and page.more:
            path = f"/v2/{exchange.requested_name}/tags/list"
            headers.append(_next_link(exchange, path, page.next_after or tags[-1], requested_count))
        return _compact_json({"name": exchange.requested_name, "tags": list(tags)}), headers

    await exchange.body_memory.send_response(exchange, make_response)


async def list_repositories(exchange: Exchange) -> None:
    """Lists the repositories that the client may pull from.

    Because the work for one page is limited, a page may be shorter than requested, or even empty, although there is a
    next page. The next page may start after a repository from which the client may not pull. To keep the name of this
    repository secret, `last` in the link is then an encrypted cursor."""
    requested_count, last = _read_count(exchange), _read_last(exchange)
    limit = exchange.limits.default_repositories_per_page if requested_count is None else requested_count
    limit = min(limit, exchange.limits.max_repositories_per_page)

    async def make_response() -> tuple[bytes, list[Header]]:
        # This call may wait for other requests of the account, because the registry makes one list at a time for each
        # account. If the client disconnects, the watch cancels the call.
        with closing(DisconnectWatch(exchange.wait_disconnected)) as watch:
            page = await watch.cancel_on_disconnect(exchange.registry.repositories(last, max(limit, 1)))
        names = page.items[:limit]
        headers = [JSON, REVALIDATE]
        if limit and page.more:
            headers.append(_next_link(exchange, "/v2/_catalog", page.next_after or names[-1], requested_count))
        return _compact_json({"repositories": list(names)}), headers

    await exchange.body_memory.send_response(exchange, make_response)


def _compact_json(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode("ascii")


def _read_count(exchange: Exchange) -> int | None:
    """Returns the query parameter `n`, the number of entries that the client wants on a page. Returns None if the query
    does not have `n`. Raises RequestInvalid if `n` is not a number of at most 18 digits."""
    text = exchange.query.one("n")
    if text is None:
        return None
    if not _COUNT_PATTERN.fullmatch(text):
        raise RequestInvalid(f"n is {shown(text)}; it has to be a number of entries, such as n=100")
    return int(text)


def _read_last(exchange: Exchange) -> str | None:
    """Returns the query parameter `last`, the entry after which the page starts. Returns None if the query does not
    have `last`. Raises RequestInvalid if `last` is longer than MAX_LAST_CHARACTERS. The limit keeps clients from
    filling the store's cache of pages, whose keys contain `last`."""
    text = exchange.query.one("last")
    if text is not None and len(text) > MAX_LAST_CHARACTERS:
        raise RequestInvalid(
            f"last has {len(text)} characters; it has to be an entry of the list, or come from the Link header of a "
            f"page, with at most {MAX_LAST_CHARACTERS} characters"
        )
    return text


def _next_link(exchange: Exchange, path: str, last: str, requested_count: int | None) -> Header:
    """Returns the Link header with the URL of the page that starts after the entry `last`. `requested_count`: the
    `n` of this request, which the URL repeats; None: the request has no `n`."""
    return exchange.next_page_link(
        path, {"last": last} if requested_count is None else {"n": str(requested_count), "last": last}
    )


async def list_referrers(exchange: Exchange) -> None:
    """Sends an image index of the manifests whose subject has the digest in the path. The subject need not exist.

    The number of entries on a page is limited. The page's size in bytes is limited as well, because clients read the
    page as a manifest, and refuse manifests that are too large."""
    subject = Digest(exchange.resource_id)
    # A media type contains no space. A '+' that the client did not percent-encode was decoded as a space.
    artifact_type = (exchange.query.one("artifactType") or "").replace(" ", "+") or None
    last = _read_last(exchange)

    async def make_response() -> tuple[bytes, list[Header]]:
        page = await exchange.registry.referrers(
            exchange.repo, subject, artifact_type, last, exchange.limits.referrers_per_page
        )
        if len(page.items) <= _MAX_SERIALISED_ON_LOOP:
            body, count = _serialise_index(page.items, exchange.limits.referrers_page_bytes)
        else:
            body, count = await asyncio.to_thread(_serialise_index, page.items, exchange.limits.referrers_page_bytes)
        headers = [_INDEX_TYPE_HEADER, REVALIDATE, *warning_headers(exchange.notice)]
        if artifact_type:
            headers.append((b"oci-filters-applied", b"artifactType"))
        if page.more or count < len(page.items):
            parameters = {"artifactType": artifact_type} if artifact_type else {}
            is_complete = count == len(page.items)  # whether the response has all referrers that the registry returned
            parameters["last"] = page.next_after if is_complete and page.next_after else page.items[count - 1].digest
            headers.append(exchange.next_page_link(f"/v2/{exchange.requested_name}/referrers/{subject}", parameters))
        return body, headers

    await exchange.body_memory.send_response(exchange, make_response)


def _serialise_index(referrers: Sequence[Descriptor], max_bytes: int) -> tuple[bytes, int]:
    """Returns an image index with as many of `referrers` as fit into `max_bytes`, in their order, and the number of
    referrers in the index. The index always contains the first referrer, even if this referrer alone is too large."""
    entries: list[bytes] = []
    size = len(_INDEX_HEAD) + len(_INDEX_TAIL)
    for referrer in referrers:
        entry = referrer.as_json_bytes()
        size += len(entry) + 1  # 1 for a comma
        if entries and size > max_bytes:
            break
        entries.append(entry)
    return _INDEX_HEAD + b",".join(entries) + _INDEX_TAIL, len(entries)
