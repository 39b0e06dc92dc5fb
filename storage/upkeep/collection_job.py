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
"""Largest number of removals that the result of a dry run lists. A command that runs the job receives all removals as
steps (`JobContext.step`)."""


def collection_work(collector: Collector) -> Work:
    """Returns the work of the job. The job has two optional arguments, each true or false. `dry_run`: whether to report
    garbage without removing it. `strays`: whether to search all shards (parts) of the blob store for *strays*, blobs
    without a row in the database. Such a search has to list all blobs of the store. By default, a round searches only
    some shards, and the next round continues after these.

    Each removal is reported as a step (`JobContext.step`). Its event is `removed`, or in a dry run `would be removed`.
    Its fields are `kind`, `repository`, `item`, `bytes` and `reason`. The result has the totals for each kind and the
    number of freed bytes; after a dry run also the first `MAX_RECORDS` removals. The job can be stopped after each
    removal; the next round removes the remaining garbage. If a restart of the server interrupts the job, the job
    begins again with a new round."""

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
        totals = {kind: {"count": report.count(kind), "bytes": report.sizes.get(kind, 0)} for kind in RemovalKind}
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
