"""The job that checks the store for damage (`fsck_work`). A *step* is a record that a job sends to a command that runs
or watches the job."""

from __future__ import annotations

from typing import Any, Final

from registry.config import Settings
from storage.jobs import JSON
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.checker import CheckOptions, Finding
from storage.upkeep.job_runner import JobContext, Work

FSCK: Final = "fsck"
"""The kind of the job."""
MAX_RECORDS: Final = 1000
"""Number of problems that the job's result lists. A command that runs the job receives all problems, as steps."""


def fsck_work(settings: Settings, store: StoredRegistry) -> Work:
    """Returns the function that runs the job. The job's arguments `repair` and `hash` (true or false) are the options
    of the command.

    Each problem is a step `problem` with the fields `code`, `repository`, `item`, `problem` and `repair`; `repair` is
    null if the problem was not repaired. The result has the number of problems by code, and the number of problems that
    are left. The job can be stopped at any time. A server that continues the job after a restart starts it from the
    beginning."""
    mirrored = tuple(f"{upstream.name}/" for upstream in settings.upstream)

    async def check(context: JobContext) -> JSON:
        records: list[dict[str, Any]] = []

        async def on_finding(finding: Finding) -> None:
            record = as_json(finding)
            context.step("problem", **record)
            if len(records) < MAX_RECORDS:
                records.append(record)

        async def on_progress(done: int, total: int, message: str) -> None:
            await context.report(done, total=total, unit="checks", message=message)

        options = CheckOptions(
            repair=bool(context.job.arguments.get("repair", False)),
            hash_bytes=bool(context.job.arguments.get("hash", False)),
            quarantine_bytes=settings.scrub.quarantine_max,
            is_mirrored=lambda name: name.startswith(mirrored),
        )
        report = await store.checker.check(options, on_finding, on_progress)
        await context.report(save_now=True)
        count_by_code = {code.value: count for code, count in report.found.items()}
        return {
            "found": count_by_code,
            "repaired": report.repaired,
            "left": report.left,
            "damaged": report.damaged,
            "records": records,
            "more": sum(count_by_code.values()) > len(records),
        }

    return check


def as_json(finding: Finding) -> dict[str, Any]:
    """Returns a finding as a JSON object."""
    problem = finding.problem
    return {
        "code": problem.code.value,
        "repository": problem.repository or None,
        "item": problem.item or None,
        "problem": problem.text,
        "repair": finding.repair,
    }
