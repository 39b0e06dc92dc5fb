"""Makes backups in jobs of the kind `backup`, which servers and the command line start."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from storage.backups import BackupFailed
from storage.jobs import JSON
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.backup.backup import BackupOptions, make_backup
from storage.upkeep.backup.earlier_backups import find_earlier_backup
from storage.upkeep.job_runner import JobContext, Work


def backup_arguments(
    target: Path, keep: int | None, *, verify: bool, may_link: bool = True, ignores_earlier_backups: bool = False
) -> dict[str, JSON]:
    """Returns the arguments of a job that makes a backup in the directory `target` (see `BackupOptions`). If earlier
    backups were made there, they may be on a disk that is not mounted now. The job then fails. With
    `ignores_earlier_backups`, the job does not check this."""
    return {
        "target": str(target.absolute()),
        "keep": keep,
        "verify": verify,
        "may_link": may_link,
        "new": ignores_earlier_backups,  # named after the option `--new` of the command
    }


def backup_work(store: StoredRegistry, data: Path, clock: Callable[[], float] = time.time) -> Work:
    """Returns the function that runs jobs of the kind `backup`. `data`: the data directory. A job fails with
    BackupFailed if its target is in the data directory. `clock` returns seconds since 1970."""

    async def work(context: JobContext) -> JSON:
        job, arguments = context.job, context.job.arguments
        target = Path(arguments["target"])
        _check_outside(target, data)
        ignores_earlier_backups = arguments.get("new", False)  # an earlier version queued jobs without this argument
        options = BackupOptions(
            target,
            keep=arguments["keep"],
            verify=arguments["verify"],
            may_link=arguments["may_link"],
            earlier=None if ignores_earlier_backups else await find_earlier_backup(store.jobs, target),
        )
        return await make_backup(
            *(store.snapshots, store.blobs, store.leases, options, context),
            clock=clock,
            holder=f"{job.actor} (job {job.id}, {job.holder})",
        )

    return work


def _check_outside(target: Path, data: Path) -> None:
    """Raises BackupFailed if `target` is the data directory or in it."""
    if target.resolve().is_relative_to(data.resolve()):
        raise BackupFailed(f"{target} is in the data directory; name a directory outside of it")
