"""The command `entrepot jobs`: lists, shows and stops jobs. A job is long work, such as a backup."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.options import MAX_ID, ConfigOption, DataOption, JsonOption
from registry.cli.output import local_time, print_json, print_line, print_rows

if TYPE_CHECKING:
    from registry.upkeep.components import UpkeepComponents
    from storage.jobs import Job

HELP = "Show and stop jobs: long work of a server or a command, such as a garbage collection or a backup."
app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)
JobArgument = Annotated[
    int, typer.Argument(metavar="JOB", min=0, max=MAX_ID, help="The number of the job, as `jobs list` shows it.")
]


@app.command(
    "list",
    help="List the jobs, newest first. The server keeps the newest thousand jobs.",
    epilog="\b\nExamples:\n  entrepot jobs list\n  entrepot jobs list --kind gc --json",
)
def list_jobs(
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="KIND", help="Only jobs of this kind, such as gc.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, max=1000, help="Show at most N jobs.")] = 50,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prints the newest jobs, as a table or as JSON."""
    from registry.admin.job_models import JobResponse
    from registry.cli.upkeep.upkeep_run import with_upkeep

    async def read(upkeep: UpkeepComponents) -> list[Job]:
        return list((await upkeep.store.jobs.jobs(None, limit, kind)).items)

    jobs = with_upkeep(config, data, read)
    if as_json:
        print_json([JobResponse.from_stored(job) for job in jobs])
    else:
        rows = [
            (str(job.id), job.kind, _state_text(job), _progress_text(job), job.actor, local_time(job.created))
            for job in jobs
        ]
        print_rows(("job", "kind", "state", "progress", "started by", "started"), rows, "there are no jobs yet")


@app.command("show", help="Show one job with its progress and result.", epilog="\b\nExample:\n  entrepot jobs show 7")
def show_job(
    job: JobArgument, config: ConfigOption = None, data: DataOption = None, as_json: JsonOption = False
) -> None:
    """Prints a job as JSON, or as a table of its fields."""
    from registry.admin.job_models import JobResponse
    from registry.cli.upkeep.upkeep_run import with_upkeep

    async def read(upkeep: UpkeepComponents) -> Job:
        return await upkeep.store.jobs.job(job)

    response = JobResponse.from_stored(with_upkeep(config, data, read))
    if as_json:
        print_json(response)
    else:
        fields = response.model_dump(mode="json")
        rows = [(name, "-" if value in (None, "") else str(value)) for name, value in fields.items()]
        print_rows(("field", "value"), rows, "")


@app.command(
    "stop",
    help="Ask the process that runs the job to stop the job. What the job has already done is not undone.",
    epilog="\b\nExample:\n  entrepot jobs stop 7",
)
def stop_job(job: JobArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    """Asks the process that runs the job to stop the job."""
    from registry.cli.upkeep.upkeep_run import with_upkeep

    async def stop(upkeep: UpkeepComponents) -> Job:
        return await upkeep.store.jobs.request_stop(job)

    stopped = with_upkeep(config, data, stop)
    if stopped.ended is None:
        print_line(f"job {job} stops within a few seconds", err=True)
    else:
        print_line(f"job {job} has ended: {stopped.state}", err=True)


def _state_text(job: Job) -> str:
    """Returns the state of a job, followed by the reason if the job has failed."""
    if job.ended is None and job.is_stopping:
        return "stopping"
    return f"{job.state}: {job.progress.message}" if job.state == "failed" else str(job.state)


def _progress_text(job: Job) -> str:
    """Returns the progress of a job, such as `12 of 40 blobs`; `-` if the job has no count."""
    progress = job.progress
    if not progress.unit:
        return "-"
    return f"{progress.done}{'' if progress.total is None else f' of {progress.total}'} {progress.unit}"
