"""Handlers for two extensions of the distribution API: the list of the extensions, and the history of a tag.

Source: OCI distribution spec, "extensions/README.md" and "extensions/_oci.md". It defines the path of an extension as
`_<namespace>/<component>/<module>`. In the path of the history, the tag takes the place of the module.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final

from registry.http.exchange import Exchange
from registry.http.query import parse_number
from registry.http.response_headers import JSON, REVALIDATE
from storage.content import Page
from storage.errors import Unsupported
from storage.names import RepositoryName, Tag
from storage.tag_history import TagChange

DEFAULT_ENTRIES: Final = 100
"""Number of entries on a page of the history if the request has no parameter `n`."""
MAX_ENTRIES: Final = 1000
"""Largest number of entries on a page of the history. A larger `n` has the same effect as this number."""
_EXTENSIONS: Final = json.dumps(
    {
        "extensions": [
            {
                "name": "_oci",
                "description": "Lists the extensions",
                "url": "https://github.com/opencontainers/distribution-spec/blob/main/extensions/_oci.md",
                "endpoints": ["_oci/ext/discover"],
            },
            {
                "name": "_entrepot",
                "description": "GET /v2/<name>/_entrepot/history/<tag> lists what a tag pointed at, newest first",
                "endpoints": ["_entrepot/history"],
            },
        ]
    }
).encode("ascii")

ReadHistory = Callable[[RepositoryName, Tag, int | None, int], Awaitable[Page[TagChange]]]
"""Returns a page of the history of a tag, if the current request may pull from the repository. The arguments are those
of `storage.tag_history.TagHistory.changes`. Raises NameUnknown, Unauthorized."""


async def list_extensions(exchange: Exchange) -> None:
    """Lists the extensions of this registry. All clients that may use the registry get the same list."""
    await exchange.send_whole(200, _EXTENSIONS, JSON, REVALIDATE)


async def no_history(repo: RepositoryName, tag: Tag, before: int | None, limit: int) -> Page[TagChange]:
    """A `ReadHistory` for a registry that keeps no history. Raises Unsupported."""
    raise Unsupported("this registry keeps no history of tags")


async def list_history(exchange: Exchange, read: ReadHistory) -> None:
    """Lists the digests that a tag has pointed at, newest first. The list is empty for a tag that never existed. Does
    not say from which address a change came, because everybody who may pull can read the list."""
    tag = Tag(exchange.resource_id)
    requested, last = _number(exchange, "n"), _number(exchange, "last")
    limit = DEFAULT_ENTRIES if requested is None else min(requested, MAX_ENTRIES)

    async def make_response() -> tuple[bytes, list[tuple[bytes, bytes]]]:
        # For `n=0`, reads one entry and drops it, so that `read` still raises its errors.
        page = await read(exchange.repo, tag, last, max(limit, 1))
        changes = page.items[:limit]
        headers = [JSON, REVALIDATE]
        if changes and page.more:
            path = f"/v2/{exchange.requested_name}/_entrepot/history/{tag}"
            headers.append(exchange.next_page_link(path, {"n": str(limit), "last": str(changes[-1].id)}))
        document = {"name": exchange.requested_name, "tag": tag, "history": [_entry(change) for change in changes]}
        return json.dumps(document, separators=(",", ":")).encode("ascii"), headers

    # A large response counts against the memory budget of the worker (`registry.http.body_memory`).
    await exchange.body_memory.send_response(exchange, make_response)


def _entry(change: TagChange) -> dict[str, Any]:
    """Returns a change as JSON. `digest` and `availability` are null if the change deleted the tag. `previous` is null
    if the change created the tag. `availability` says whether the repository still has the manifest `digest`
    (`storage.tag_history.Availability`)."""
    return {
        "id": str(change.id),
        "at": datetime.fromtimestamp(round(change.at, 3), UTC).isoformat().replace("+00:00", "Z"),
        "digest": change.digest,
        "previous": change.previous,
        "availability": change.availability,
        "actor": change.by.name,
    }


def _number(exchange: Exchange, name: str) -> int | None:
    """Returns the query parameter `name` as a number. Returns None if the query does not have it. Raises RequestInvalid
    if it is not a number."""
    text = exchange.query.one(name)
    return None if text is None else parse_number(text, f"{name} has to be a number, such as {name}=100")
