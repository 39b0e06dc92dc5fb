"""The state of the mirrors, which `entrepot mirror status` prints: values for JSON, or tables for people.

- An *upstream* is a remote registry that this registry mirrors.
- A *fill* is the download of one blob from an upstream. A *partial* is the received bytes of an unfinished fill.
- An *allowance* is the state of an upstream's rate limit: how many requests the upstream still accepts.
- A *frozen* tag is always served at the same digest. The mirror does not ask the upstream about the tag.
- A *cooldown* delays moves of a tag. The tag is *held back* while pulls do not get its newest digest yet.

Times are in seconds since 1970.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from registry.cli.output import human_size, new_table, plain_console, plural
from registry.config import Settings, Upstream
from registry.mirror.freshness import Freshness, Verdict
from registry.mirror.served_tags import ServedTags
from registry.upstream.rate_limits import manifests_limited_until
from storage.composition import list_partials, open_inventory
from storage.content import Allowance
from storage.inventory import Inventory
from storage.store.stored_registry import StoredRegistry
from storage.upstream_records import UpstreamRecords
from storage.upstream_tags import UpstreamTags

_SHORT_DIGEST = len("sha256:") + 12
"""Number of characters of a digest that a table shows. JSON contains the whole digest."""


async def read_status(settings: Settings, stored: StoredRegistry) -> dict[str, Any]:
    """Returns the state of the mirrors as JSON types, in two lists. "upstreams" has an entry for each upstream in the
    settings (`_upstream_status`). "fills" has an entry for each unfinished download (`_fills`)."""
    with open_inventory(settings.data) as inventory:
        upstreams = [await _upstream_status(upstream, stored, inventory) for upstream in settings.upstream]
    return {"upstreams": upstreams, "fills": _fills(settings.data)}


async def _upstream_status(upstream: Upstream, stored: StoredRegistry, inventory: Inventory) -> dict[str, Any]:
    """Returns the entry of one upstream for JSON: its endpoints (URLs), the numbers of cached objects and their size in
    bytes, the allowance, and the tags that are frozen or held back."""
    records = stored.records
    frozen = await _frozen_tags(upstream, stored.upstream_tags)
    totals = inventory.totals_below(upstream.name)  # mirrored repositories are stored below the upstream's name
    allowance = await records.allowance(upstream.name)
    paused_until = await manifests_limited_until(records, upstream.name, upstream.endpoints, time.time())
    return {
        "name": upstream.name,
        "default": upstream.default,
        "endpoints": list(upstream.endpoints),
        "repositories": totals.repositories,
        "tags": totals.tags,
        "stale": await _count_stale_tags(upstream, records, inventory, frozen),
        "manifests": totals.manifests,
        "blobs": totals.blobs,
        "size": totals.size,
        "allowance": _allowance_values(allowance, paused_until),
        "frozen": frozen,
        "held_back": await _held_back_tags(upstream, stored.upstream_tags, inventory, frozen),
    }


async def _frozen_tags(upstream: Upstream, tags: UpstreamTags) -> list[str]:
    """Returns the frozen tags of the upstream in the form `REPOSITORY:TAG`, sorted by repository and tag."""
    prefix, frozen_tags = f"{upstream.name}/", list[str]()
    # The store sorts frozen tags by repository and tag. `after` has the form `REPOSITORY:TAG`. The first
    # `after` has the repository `UPSTREAM/` and an empty tag. It sorts directly before all tags of the upstream.
    after = f"{prefix}:"
    while True:
        page = await tags.frozen_tags(after, 1000)
        frozen_tags += [str(frozen) for frozen in page.items if frozen.repository.startswith(prefix)]
        if not page.more or not page.items[-1].repository.startswith(prefix):
            return frozen_tags
        after = str(page.items[-1])


async def _held_back_tags(
    upstream: Upstream, tags: UpstreamTags, inventory: Inventory, frozen: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns for JSON the cached tags that are held back. Leaves out the tags in `frozen`.

    - "served": the digest that pulls get now; None: pulls are refused.
    - "newest": the digest at which the upstream's tag points.
    - "from": the time at which pulls begin to get the newest digest, if the tag does not move again."""
    if not upstream.cooldown:
        return []
    served_tags, ignored, held_back = ServedTags(tags, upstream, time.time), set(frozen), []
    for repo, tag in inventory.tags_below(upstream.name):
        choice = await served_tags.choose(repo, tag)
        if choice is not None and choice.newest_held_back_until is not None and f"{repo}:{tag}" not in ignored:
            # The candidates are the digests that may be served, the preferred one first.
            served = choice.candidates[0] if choice.candidates else None
            held_back.append(
                {
                    "tag": f"{repo}:{tag}",
                    "served": served,
                    "newest": choice.newest,
                    "from": choice.newest_held_back_until,
                }
            )
    return held_back


async def _count_stale_tags(
    upstream: Upstream, records: UpstreamRecords, inventory: Inventory, frozen: Sequence[str]
) -> int:
    """Returns how many cached tags are stale. A tag is stale if the mirror has not asked the upstream about it within
    the tag's time to live. A frozen tag is never stale."""
    freshness, ignored = Freshness(upstream, time.time), set(frozen)
    count = 0
    for repo, tag in inventory.tags_below(upstream.name):
        if f"{repo}:{tag}" not in ignored:
            count += freshness.judge(tag, await records.last_check(repo, tag)) is not Verdict.FRESH
    return count


def _allowance_values(allowance: Allowance | None, paused_until: float | None) -> dict[str, Any] | None:
    """Returns the allowance for JSON; None if both arguments are None. "remaining" is the number of requests that the
    upstream still accepts, "limit" the number that it accepts in each period, and "at" the time at which it reported
    these numbers. "until" is `paused_until`.

    `paused_until`: the time until which the mirror requests no manifests, because the upstream has answered a request
    for a manifest with status 429; None: the requests are not paused."""
    if allowance is None and paused_until is None:
        return None
    return {
        "remaining": allowance.remaining if allowance else None,
        "limit": allowance.limit if allowance else None,
        "at": allowance.at if allowance else None,
        "until": paused_until,
    }


def _fills(data: Path) -> list[dict[str, Any]]:
    """Returns the unfinished downloads for JSON. "size" is the size of the whole blob in bytes, "here" the number of
    bytes received so far. "running" is True if a process is downloading the rest now."""
    return [
        {"digest": partial.digest, "size": partial.size, "here": partial.received, "running": partial.is_downloading}
        for partial in list_partials(data)
    ]


def print_status(status: dict[str, Any]) -> None:
    """Prints the result of `read_status` as tables for people."""
    console = plain_console()
    table = new_table("upstream", "repositories", "tags", "stale", "manifests", "blobs", "size", "requests left")
    for upstream in status["upstreams"]:
        counts = [str(upstream[name]) for name in ("repositories", "tags", "stale", "manifests", "blobs")]
        name = upstream["name"] + (" (default)" if upstream["default"] else "")
        size, requests_left = human_size(upstream["size"]), _allowance_text(upstream["allowance"])
        table.add_row(*map(Text, (name, *counts, size, requests_left)))
    console.print(table)
    for upstream in status["upstreams"]:
        console.print(Text(f"requests for {upstream['name']} go to {', '.join(upstream['endpoints'])}", "dim"))
    _print_frozen_and_held_back_tags(console, status["upstreams"])
    if status["fills"]:
        downloads = new_table("unfinished download", "size", "done", "state")
        for fill in status["fills"]:
            state = "running" if fill["running"] else "continues when the blob is requested again"
            downloads.add_row(*map(Text, (fill["digest"], human_size(fill["size"]), _percent_text(fill), state)))
        console.print()
        console.print(downloads)


def _print_frozen_and_held_back_tags(console: Console, upstreams: list[dict[str, Any]]) -> None:
    """Prints how many tags are frozen, and a table of the tags that a cooldown holds back. The column "newer" shows the
    newest digest of a tag, "newer is due" the time at which pulls begin to get this digest."""
    if frozen := sum(len(upstream["frozen"]) for upstream in upstreams):
        console.print(Text(f"{plural(frozen, 'tag')} frozen; to list them, run: entrepot mirror frozen", "dim"))
    held_back = [held_tag for upstream in upstreams for held_tag in upstream["held_back"]]
    if held_back:
        table = new_table("held back", "served", "newer", "newer is due")
        for held_tag in held_back:
            served, newest = (held_tag["served"] or "nothing yet")[:_SHORT_DIGEST], held_tag["newest"][:_SHORT_DIGEST]
            table.add_row(*map(Text, (held_tag["tag"], served, newest, _local_time(held_tag["from"]))))
        console.print()
        console.print(table)


def _percent_text(fill: dict[str, Any]) -> str:
    """Returns how much of a blob has been received, such as `40 %`."""
    return f"{100 * fill['here'] // fill['size'] if fill['size'] else 100} %"


def _allowance_text(allowance: dict[str, Any] | None) -> str:
    """Returns the result of `_allowance_values` as text:

    - While requests are paused: the end of the pause (`none until 14:30`).
    - Otherwise: the remaining requests and the time of the report (`57 of 100 at 14:02`).
    - Without a report: `-`."""
    if allowance is None:
        return "-"
    if allowance["until"]:
        return f"none until {_local_time(allowance['until'])}"
    if allowance["remaining"] is None:
        return "-"
    of_limit = f" of {allowance['limit']}" if allowance["limit"] is not None else ""
    return f"{allowance['remaining']}{of_limit} at {_local_time(allowance['at'])}"


def _local_time(timestamp: float) -> str:
    """Returns `timestamp` as text in local time: the hour and minute, with the date in front if it is not today."""
    moment = datetime.fromtimestamp(timestamp)
    return moment.strftime("%H:%M" if moment.date() == datetime.now().date() else "%Y-%m-%d %H:%M")
