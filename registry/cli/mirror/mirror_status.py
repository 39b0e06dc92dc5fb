"""The state of the mirrors that `entrepot mirror status` shows, as plain values for JSON and as tables."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.text import Text

from registry.cli.output import human_size, new_table, plain_console
from registry.config import Settings, Upstream
from registry.mirror.freshness import Freshness, Verdict
from registry.upstream.rate_limits import manifests_limited_until
from storage.composition import list_partials, open_inventory
from storage.content import Allowance
from storage.inventory import Inventory
from storage.upstream_records import UpstreamRecords


async def read_status(settings: Settings, records: UpstreamRecords) -> dict[str, Any]:
    """Returns each upstream's endpoints, cached content and rate limit, and all unfinished downloads."""
    with open_inventory(settings.data) as inventory:
        upstreams = [await _upstream(upstream, records, inventory) for upstream in settings.upstream]
    return {"upstreams": upstreams, "fills": _fills(settings.data)}


async def _upstream(upstream: Upstream, records: UpstreamRecords, inventory: Inventory) -> dict[str, Any]:
    held = inventory.below(upstream.name)
    allowance = await records.allowance(upstream.name)
    until = await manifests_limited_until(records, upstream.name, upstream.endpoints, time.time())
    return {
        "name": upstream.name,
        "default": upstream.default,
        "endpoints": list(upstream.endpoints),
        "repositories": held.repositories,
        "tags": held.tags,
        "stale": await _stale(upstream, records, inventory),
        "manifests": held.manifests,
        "blobs": held.blobs,
        "size": held.size,
        "allowance": _allowance(allowance, until),
    }


async def _stale(upstream: Upstream, records: UpstreamRecords, inventory: Inventory) -> int:
    """Returns how many tags are stale: the next request for one of them asks the upstream."""
    freshness = Freshness(upstream, time.time)
    stale = 0
    for repo, tag in inventory.tags_below(upstream.name):
        stale += freshness.judge(tag, await records.check(repo, tag)) is not Verdict.FRESH
    return stale


def _allowance(allowance: Allowance | None, until: float | None) -> dict[str, Any] | None:
    if allowance is None and until is None:
        return None
    return {
        "remaining": allowance.remaining if allowance else None,
        "limit": allowance.limit if allowance else None,
        "at": allowance.at if allowance else None,
        "until": until,
    }


def _fills(data: Path) -> list[dict[str, Any]]:
    return [
        {"digest": each.digest, "size": each.size, "here": each.received, "running": each.is_owned}
        for each in list_partials(data)
    ]


def print_status(seen: dict[str, Any]) -> None:
    """Prints the state as tables for people."""
    console = plain_console()
    table = new_table("upstream", "repositories", "tags", "stale", "manifests", "blobs", "size", "requests left")
    for each in seen["upstreams"]:
        counts = [str(each[name]) for name in ("repositories", "tags", "stale", "manifests", "blobs")]
        name = each["name"] + (" (default)" if each["default"] else "")
        table.add_row(*map(Text, (name, *counts, human_size(each["size"]), _allowance_text(each["allowance"]))))
    console.print(table)
    for each in seen["upstreams"]:
        console.print(Text(f"{each['name']} answers at {', '.join(each['endpoints'])}", "dim"))
    if seen["fills"]:
        fills = new_table("unfinished download", "size", "done", "state")
        for each in seen["fills"]:
            state = "running" if each["running"] else "continues with the next request for it"
            fills.add_row(*map(Text, (each["digest"], human_size(each["size"]), _percent(each), state)))
        console.print()
        console.print(fills)


def _percent(fill: dict[str, Any]) -> str:
    return f"{100 * fill['here'] // fill['size'] if fill['size'] else 100} %"


def _allowance_text(allowance: dict[str, Any] | None) -> str:
    """Returns the requests that are left and when the upstream said so (`57 of 100 at 14:02`), or until when it refuses
    more."""
    if allowance is None:
        return "-"
    if allowance["until"]:
        return f"none until {_time(allowance['until'])}"
    if allowance["remaining"] is None:
        return "-"
    most = f" of {allowance['limit']}" if allowance["limit"] is not None else ""
    return f"{allowance['remaining']}{most} at {_time(allowance['at'])}"


def _time(at: float) -> str:
    """Writes a time as local time, with the date unless it is today."""
    moment = datetime.fromtimestamp(at)
    return moment.strftime("%H:%M" if moment.date() == datetime.now().date() else "%Y-%m-%d %H:%M")
