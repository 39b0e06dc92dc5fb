"""The job that checks the store for damage (`fsck_work`). A *step* is a record that a job sends to the commands that
run or watch the job."""

from __future__ import annotations

from typing import Any, Final

from registry.config import Settings
from storage.jobs import JSON
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.checker import CheckOptions, ConfirmedProblem
from storage.upkeep.job_runner import JobContext, Work

FSCK: Final = "fsck"
"""The kind of the job."""
MAX_RECORDS: Final = 1000
"""Largest number of problems that the job's result lists. The job sends every problem as a step."""


def fsck_work(settings: Settings, store: StoredRegistry) -> Work:
    """Returns the function that runs the job. The job has the arguments `repair` and `hash` (true or false), which are
    the options of `entrepot fsck`. The job can be stopped at any time. After a restart of the server, the job starts
    from the beginning.

    The job sends a step `problem` for each problem, with the fields `code`, `repository`, `item`, `problem` and
    `repair`. `repair` says how the problem was repaired; it is null if the problem was not repaired. The result of the
    job has these fields:

    - `found`: maps each code to the number of problems with this code.
    - `repaired`, `left`: the number of problems that were repaired, and of those that were not repaired.
    - `damaged`: the number of blobs and manifests that are recorded as damaged at the end of the check. Content that
      was recorded as damaged before the check is not a problem. The repair of a damaged blob cannot restore
      its bytes. It records the blob as damaged, and the registry does not serve the blob until it is stored again. So
      this blob counts in `repaired` and also in `damaged`.
    - `records`: the first `MAX_RECORDS` problems, each with the fields of its step.
    - `more`: whether there are more problems than in `records`."""
    mirrored = tuple(f"{upstream.name}/" for upstream in settings.upstream)

    async def check(context: JobContext) -> JSON:
        records: list[dict[str, Any]] = []

        async def on_problem(confirmed: ConfirmedProblem) -> None:
            record = as_json(confirmed)
            context.step("problem", **record)
            if len(records) < MAX_RECORDS:
                records.append(record)

        async def on_progress(done: int, total: int, message: str) -> None:
            await context.report(done, total=total, unit="checks", message=message)

        options = CheckOptions(
            repair=bool(context.job.arguments.get("repair", False)),
            hash_bytes=bool(context.job.arguments.get("hash", False)),
            max_quarantine_bytes=settings.scrub.quarantine_max,
            is_mirrored=lambda name: name.startswith(mirrored),
        )
        check_report = await store.checker.check(options, on_problem, on_progress)
        await context.report(save_now=True)  # saves the last progress, which `on_progress` may not have saved
        count_by_code = {code.value: count for code, count in check_report.found.items()}
        return {
            "found": count_by_code,
            "repaired": check_report.repaired,
            "left": check_report.left,
            "damaged": check_report.damaged,
            "records": records,
            "more": sum(count_by_code.values()) > len(records),
        }

    return check


def as_json(confirmed: ConfirmedProblem) -> dict[str, Any]:
    """Returns a confirmed problem as a JSON object."""
    problem = confirmed.problem
    return {
        "code": problem.code.value,
        "repository": problem.repository or None,
        "item": problem.item or None,
        "problem": problem.text,
        "repair": confirmed.repair,
    }
