"""Handlers for two extensions of the distribution API: the list of the extensions, and the history of a tag.

The OCI distribution spec ("extensions/README.md", "extensions/_oci.md") defines the path of an extension as
`_<namespace>/<component>/<module>`. The path of a tag's history is `_entrepot/history/<tag>`: the tag takes the place
of the module.
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
"""Largest number of entries on a page of the history, even if `n` is larger."""
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
"""A function that returns a page of a tag's history. Its arguments are those of
`storage.tag_history.TagHistory.changes`. Checks that the current request may pull from the repository. Raises
NameUnknown, Unauthorized."""


async def list_extensions(exchange: Exchange) -> None:
    """Sends the list of the registry's extensions. Checks no right: all clients get the same list."""
    await exchange.send_whole(200, _EXTENSIONS, JSON, REVALIDATE)


async def refuse_history(repo: RepositoryName, tag: Tag, before: int | None, limit: int) -> Page[TagChange]:
    """A `ReadHistory` for a registry that keeps no history. Raises Unsupported."""
    raise Unsupported("this registry keeps no history of tags")


async def list_history(exchange: Exchange, read: ReadHistory) -> None:
    """Sends the list of the digests that a tag has pointed at, newest first. For a tag that never existed, the list is
    empty. The list does not contain client addresses, because everybody who may pull can read it."""
    tag = Tag(exchange.resource_id)
    requested, last = _number_parameter(exchange, "n"), _number_parameter(exchange, "last")
    limit = DEFAULT_ENTRIES if requested is None else min(requested, MAX_ENTRIES)

    async def make_response() -> tuple[bytes, list[tuple[bytes, bytes]]]:
        # For `n=0`, `read` must be called too, because it checks the request's rights. It is then asked for one entry,
        # which the response leaves out.
        page = await read(exchange.repo, tag, last, max(limit, 1))
        changes = page.items[:limit]
        headers = [JSON, REVALIDATE]
        if changes and page.more:
            path = f"/v2/{exchange.requested_name}/_entrepot/history/{tag}"
            headers.append(exchange.next_page_link(path, {"n": str(limit), "last": str(changes[-1].id)}))
        document = {
            "name": exchange.requested_name,
            "tag": tag,
            "history": [_change_as_json(change) for change in changes],
        }
        return json.dumps(document, separators=(",", ":")).encode("ascii"), headers

    # A large response counts against the memory budget of the worker (`registry.http.body_memory`).
    await exchange.body_memory.send_response(exchange, make_response)


def _change_as_json(change: TagChange) -> dict[str, Any]:
    """Converts a change of a tag to an object for JSON.

    - `digest`: what the tag points at after the change; null if the change deleted the tag.
    - `previous`: what the tag pointed at before the change; null if the change created the tag.
    - `availability`: whether the repository still has the manifest `digest` (`storage.tag_history.Availability`); null
      if the change deleted the tag."""
    return {
        "id": str(change.id),
        "at": datetime.fromtimestamp(round(change.at, 3), UTC).isoformat().replace("+00:00", "Z"),
        "digest": change.digest,
        "previous": change.previous,
        "availability": change.availability,
        "actor": change.by.name,
    }


def _number_parameter(exchange: Exchange, name: str) -> int | None:
    """Returns the query parameter `name` as a number. Returns None if the parameter is missing. Raises RequestInvalid
    if its value is not a number."""
    text = exchange.query.one(name)
    return None if text is None else parse_number(text, f"{name} has to be a number, such as {name}=100")
