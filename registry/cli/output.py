"""A survey as a person reads it."""

from __future__ import annotations

import sys
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

IMAGE_CONFIGS = {"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"}
"""Artifact types that only say "an image"."""
MAX_LISTED = 20
"""Tags and referrers listed at the most; the rest is counted."""


def print_image_summary(seen: dict[str, Any]) -> None:
    """Prints it; plain, whole lines when stdout is no terminal."""
    console = plain_console()
    console.print(Text(seen["reference"], "bold"))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(seen):
        facts.add_row(Text(f"  {name}", "dim"), Text(value))
    console.print(facts)
    rows = _rows(seen)
    if rows.row_count:
        console.print()
        console.print(rows)


def plain_console() -> Console:
    """Prints what it is given, whole: a terminal wraps what is too long, a file or pipe gets it in one line."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def human_size(count: int) -> str:
    """`1536` as `1.5 KiB`."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _facts(seen: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("digest", seen["digest"]), ("type", seen["mediaType"])]
    if seen["artifactType"] and seen["artifactType"] not in IMAGE_CONFIGS:
        facts.append(("artifact", seen["artifactType"]))
    if "total" in seen:
        facts.append(("size", f"{human_size(seen['total'])} (manifest {human_size(seen['size'])})"))
    else:
        facts.append(("size", f"{human_size(seen['size'])}, {len(seen['manifests'])} manifests"))
    for name in ("platform", "created", "subject"):
        if seen.get(name):
            facts.append((name, seen[name]))
    facts.append(("tags", _some(seen["tags"]) or "(none)"))
    if seen["referrers"]:
        kinds = _some([f"{r.get('artifactType') or r['mediaType']} {r['digest']}" for r in seen["referrers"]])
        facts.append(("referrers", f"{len(seen['referrers'])}: {kinds}"))
    facts += [("annotation", f"{name} = {value}") for name, value in sorted(seen["annotations"].items())]
    return facts


def _some(texts: list[str]) -> str:
    rest = len(texts) - MAX_LISTED
    return ", ".join(texts[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def new_table(*columns: str) -> Table:
    """An empty table; a cell that does not fit is folded, never cut."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name in ("role", "platform", "size"))
    return table


def _rows(seen: dict[str, Any]) -> Table:
    if "manifests" in seen:
        table = new_table("platform", "size", "digest", "type")
        for child in seen["manifests"]:
            total = "(not here)" if child["total"] is None else human_size(child["total"])
            table.add_row(*map(Text, (child["platform"] or "-", total, child["digest"], child["mediaType"])))
        return table
    table = new_table("role", "size", "digest", "type")
    parts = [("config", seen["config"])] if seen["config"] else []
    parts += [(f"layer {place}", layer) for place, layer in enumerate(seen["layers"], 1)]
    for role, part in parts:
        table.add_row(*map(Text, (role, human_size(part["size"]), part["digest"], part["mediaType"])))
    return table
