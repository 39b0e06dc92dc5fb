"""Handlers that list tags, repositories and referrers, in pages (OCI distribution spec, "Content Discovery").

The Link header of a page leads to the next one. `n` in the query is the number of entries that the client wants on a
page, and `last` the entry after which the page starts.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from contextlib import closing

from registry.asgi import Header
from registry.http.disconnect import DisconnectWatch
from registry.http.exchange import Exchange
from registry.http.response_headers import JSON, REVALIDATE, warning_headers
from registry.request import RequestInvalid
from storage.content import OCI_INDEX, Descriptor
from storage.names import Digest, shown

_COUNT = re.compile(r"[0-9]{1,18}")
_INDEX_TYPE: Header = (b"content-type", OCI_INDEX.encode())
_INDEX_HEAD = f'{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":['.encode()
_INDEX_TAIL = b"]}"
_SERIALISED_ON_LOOP = 100
"""Most referrers that are serialised on the event loop. A longer list is serialised in a thread, because it would block
the loop."""


async def list_tags(exchange: Exchange) -> None:
    """Lists a repository's tags. With `n=0` the list is empty, as the spec says. An unknown repository gets 404 even
    then."""
    requested, last = _read_count(exchange), exchange.query.one("last")
    max_tags = exchange.limits.tags_per_page
    limit = max_tags if requested is None else min(requested, max_tags)

    async def make_response() -> tuple[bytes, list[Header]]:
        page = await exchange.registry.tags(exchange.repo, last, max(limit, 1))
        tags = page.items[:limit]
        headers = [JSON, REVALIDATE, *warning_headers(exchange.notice)]
        if tags and page.more:
            path = f"/v2/{exchange.requested_name}/tags/list"
            headers.append(_next_link(exchange, path, page.next_after or tags[-1], requested))
        return _compact_json({"name": exchange.requested_name, "tags": list(tags)}), headers

    await exchange.body_memory.send_response(exchange, make_response)


async def list_repositories(exchange: Exchange) -> None:
    """Lists the repositories that the principal may pull from.

    A page may be shorter than requested, or even empty, and still have a link to the next page, because the work for
    one page is bounded. `last` in that link may be an encrypted cursor instead of a name, because the principal must
    not learn the names of other repositories."""
    requested, last = _read_count(exchange), exchange.query.one("last")
    limit = exchange.limits.default_catalog_page if requested is None else requested
    limit = min(limit, exchange.limits.max_catalog_page)

    async def make_response() -> tuple[bytes, list[Header]]:
        # The registry runs the lists of one account one after another, so this call may wait for others. It stops
        # waiting when its client disconnects.
        with closing(DisconnectWatch(exchange.wait_disconnected)) as watch:
            page = await watch.cancel_on_disconnect(exchange.registry.repositories(last, max(limit, 1)))
        names = page.items[:limit]
        headers = [JSON, REVALIDATE]
        if limit and page.more:
            headers.append(_next_link(exchange, "/v2/_catalog", page.next_after or names[-1], requested))
        return _compact_json({"repositories": list(names)}), headers

    await exchange.body_memory.send_response(exchange, make_response)


def _compact_json(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode("ascii")


def _read_count(exchange: Exchange) -> int | None:
    """Returns `n` of the query, the number of entries that the client wants on a page; None without it. Raises
    RequestInvalid."""
    text = exchange.query.one("n")
    if text is None:
        return None
    if not _COUNT.fullmatch(text):
        raise RequestInvalid(f"n is {shown(text)}; it has to be a number of entries, such as n=100")
    return int(text)


def _next_link(exchange: Exchange, path: str, last: str, requested: int | None) -> Header:
    """Returns the Link header to the page that starts after the entry `last`, with the same `n` as this page."""
    return exchange.next_page_link(path, {"last": last} if requested is None else {"n": str(requested), "last": last})


async def list_referrers(exchange: Exchange) -> None:
    """Lists the manifests whose subject is the manifest with the digest in the path, as an image index.

    That manifest need not exist. A page is limited in entries and in bytes, because clients accept only manifests up to
    a certain size."""
    subject = Digest(exchange.item)
    # A media type contains no space. A '+' that the client did not percent-encode was decoded as a space.
    artifact_type = (exchange.query.one("artifactType") or "").replace(" ", "+") or None
    last = exchange.query.one("last")

    async def make_response() -> tuple[bytes, list[Header]]:
        page = await exchange.registry.referrers(
            exchange.repo, subject, artifact_type, last, exchange.limits.referrers_per_page
        )
        if len(page.items) <= _SERIALISED_ON_LOOP:
            body, count = _index(page.items, exchange.limits.referrers_page_bytes)
        else:
            body, count = await asyncio.to_thread(_index, page.items, exchange.limits.referrers_page_bytes)
        headers = [_INDEX_TYPE, REVALIDATE, *warning_headers(exchange.notice)]
        if artifact_type:
            headers.append((b"oci-filters-applied", b"artifactType"))
        if page.more or count < len(page.items):
            parameters = {"artifactType": artifact_type} if artifact_type else {}
            has_all = count == len(page.items)
            parameters["last"] = page.next_after if has_all and page.next_after else page.items[count - 1].digest
            headers.append(exchange.next_page_link(f"/v2/{exchange.requested_name}/referrers/{subject}", parameters))
        return body, headers

    await exchange.body_memory.send_response(exchange, make_response)


def _index(referrers: Sequence[Descriptor], max_bytes: int) -> tuple[bytes, int]:
    """Returns an image index with the first of `referrers` that fit into `max_bytes`, and how many it contains. It
    contains at least one, however large."""
    parts: list[bytes] = []
    size = len(_INDEX_HEAD) + len(_INDEX_TAIL)
    for referrer in referrers:
        part = referrer.as_json_text()
        size += len(part) + 1
        if parts and size > max_bytes:
            break
        parts.append(part)
    return _INDEX_HEAD + b",".join(parts) + _INDEX_TAIL, len(parts)
