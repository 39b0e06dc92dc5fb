"""Runs the work of upkeep commands on the data directory, which a server may use at the same time. Shows the progress.

In a terminal, a command shows a progress bar. With `--json`, it prints one JSON object per line on stdout: a line for
each step, and a last line with the totals. The key `event` names the step. In the last line, `event` is `done`. A
command that completes prints the last line, even if it has found problems. A command that fails or is interrupted does
not print the last line.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from registry.cli.data_owner import operator_actor, run_on_backend
from registry.cli.options import load_or_fail, one_line_errors
from registry.cli.output import print_json_value, progress_console

if TYPE_CHECKING:
    from registry.upkeep.components import UpkeepComponents
    from storage.jobs import JSON, JobProgress
    from storage.upkeep.job_runner import OnProgress, Work

T = TypeVar("T")
_LEFT_OUT_KEYS = frozenset({"records", "more", "evicted", "listed_problems"})
"""Keys in a job's result that the last line of `--json` leaves out. The command has already printed the steps that
`records`, `evicted` and `listed_problems` list. `more` says whether such a list is incomplete."""
JsonLinesOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object per line for each step, and the result at the end.")
]


def with_upkeep(
    config: Path | None,
    data: str | None,
    work: Callable[[UpkeepComponents], Awaitable[T]],
    mirror: list[str] | None = None,
    *,
    create_data_directory: bool = False,
) -> T:
    """Opens the data directory and the mirrors, calls `work` with the objects that do upkeep on them, and returns the
    result of `work`. A server may use the directory at the same time.

    `config`, `data` and `mirror`: the values of the options `--config`, `--data` and `--mirror`.
    `create_data_directory`: whether to create the data directory if there is none. An error that an operator can fix
    ends the command with one line on stderr."""
    settings = load_or_fail(config, data=data, mirror=mirror).settings
    with one_line_errors():
        return run_on_backend(settings, lambda backend: work(backend.upkeep), create_if_missing=create_data_directory)


def run_as_job(
    config: Path | None,
    data: str | None,
    kind: str,
    arguments: Mapping[str, JSON],
    get_work: Callable[[UpkeepComponents], Work],
    *,
    as_json: bool,
    on_step: Callable[[Mapping[str, JSON]], None] | None = None,
    create_data_directory: bool = False,
) -> JSON:
    """Runs the work of a command as a *job*: work that is recorded in the data directory, so that `entrepot jobs` can
    show and stop it. Returns the job's result. Ends the command with one line on stderr if another process runs a job
    of the same kind.

    - `kind` and `arguments`: the kind and the arguments of the job.
    - `get_work`: is called with the objects that do upkeep on the data directory and the mirrors. Returns the function
      that does the work of the job.
    - `as_json`: if True, prints each step as a line of JSON. If False, calls `on_step` for each step, and shows a
      progress bar in a terminal.

    The other parameters are those of `with_upkeep`."""

    async def run_job(upkeep: UpkeepComponents) -> JSON:
        from storage.upkeep.job_runner import run_in_command

        with progress_bar(hidden=as_json) as on_progress:
            return await run_in_command(
                upkeep.store.jobs,
                upkeep.store.leases,
                kind,
                arguments,
                get_work(upkeep),
                actor=operator_actor().name,
                on_step=print_json_line if as_json else on_step,
                on_progress=on_progress,
            )

    return with_upkeep(config, data, run_job, create_data_directory=create_data_directory)


def print_done(totals: Mapping[str, JSON]) -> None:
    """Prints the last line of a command with `--json`. `totals`: the job's result, from which the line leaves out
    `_LEFT_OUT_KEYS`."""
    print_json_line({"event": "done", **{name: value for name, value in totals.items() if name not in _LEFT_OUT_KEYS}})


def print_json_line(fields: Mapping[str, JSON]) -> None:
    """Prints a JSON object as one line on stdout."""
    print_json_value(dict(fields))


@contextmanager
def progress_bar(*, hidden: bool) -> Iterator[OnProgress]:
    """Context manager that yields a function which shows a job's progress in a bar. The bar disappears at the end of
    the block. If `hidden` is True or stderr is no terminal, there is no bar, and the function does nothing."""
    if hidden or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f} {task.fields[unit]}", markup=False),
        TimeRemainingColumn(),
    )
    redirect_stdout = sys.stdout.isatty()
    with Bars(*columns, console=progress_console(), transient=True, redirect_stdout=redirect_stdout) as bars:
        task = bars.add_task("", total=None, unit="")

        def show(progress: JobProgress) -> None:
            bars.update(
                task, description=progress.message, completed=progress.done, total=progress.total, unit=progress.unit
            )

        yield show
