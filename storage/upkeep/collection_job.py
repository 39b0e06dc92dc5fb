"""The job that runs one round of garbage collection (`collection_work`)."""

from __future__ import annotations

from typing import Any, Final

from storage.jobs import JSON
from storage.upkeep.collection_report import Removal, RemovalKind
from storage.upkeep.collector import Collector
from storage.upkeep.job_runner import JobContext, Work

GC: Final = "gc"
"""The kind of the job."""
MAX_RECORDS: Final = 1000
"""Largest number of removals in the result of a dry run. The job reports all removals as steps (`JobContext.step`)."""


def collection_work(collector: Collector) -> Work:
    """Returns the work of the job. The job has two optional arguments, each true or false:

    - `dry_run`: whether to report the garbage without removing it.
    - `strays`: whether to search all shards (parts) of the blob store for *strays*, bytes for which the database has no
      row. By default, each round searches only some shards, and the next round searches the shards after them.

    The job reports each removal as a step (`JobContext.step`). The event of the step is `removed`, or `would be
    removed` in a dry run. Its fields are `kind`, `repository`, `item`, `bytes` and `reason`. The result of the job has
    the totals for each kind and the number of freed bytes. The result of a dry run has the first `MAX_RECORDS` removals
    too. The job can be stopped after each removal. After a restart of the server, the job begins a new round."""

    async def collect(context: JobContext) -> JSON:
        dry_run = bool(context.job.arguments.get("dry_run", False))
        all_shards = bool(context.job.arguments.get("strays", False))
        records: list[dict[str, Any]] = []
        count = freed_bytes = 0

        async def on_removal(removal: Removal) -> None:
            nonlocal count, freed_bytes
            count += 1
            freed_bytes += removal.size
            record = as_json(removal)
            context.step("would be removed" if dry_run else "removed", **record)
            if dry_run and len(records) < MAX_RECORDS:
                records.append(record)
            verb = "found" if dry_run else "removed"
            await context.report(count, unit="items", message=f"{verb} garbage of {freed_bytes} bytes")

        await context.report(0, unit="items", message="looking for garbage", save_now=True)
        report = await collector.collect(on_removal, dry_run=dry_run, all_shards=all_shards)
        await context.report(count, save_now=True)
        totals = {kind: {"count": report.count_of(kind), "bytes": report.sizes.get(kind, 0)} for kind in RemovalKind}
        result: dict[str, Any] = {"dry_run": dry_run, "bytes": report.freed_bytes, "totals": totals}
        if dry_run:
            result |= {"records": records, "more": count > len(records)}
        return result

    return collect


def as_json(removal: Removal) -> dict[str, Any]:
    """Returns a removal as a JSON object."""
    return {
        "kind": removal.kind.value,
        "repository": removal.repository or None,
        "item": removal.item or None,
        "bytes": removal.size,
        "reason": removal.reason,
    }
