"""Progress of `entrepot mirror warm`: bars in a terminal, otherwise one line for each reference."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from registry.cli.output import human_size, plural
from registry.mirror.warm.warmer import WarmObserver, WarmResult
from storage.content import Descriptor
from storage.names import Digest, ImageReference

SHORT_DIGEST_LENGTH = len("sha256:") + 12
"""Characters of a digest that suffice to tell the blobs of an image apart."""


class LineProgress(WarmObserver):
    """Prints a line when a reference is done."""

    def on_blob_wanted(self, where: ImageReference, blob: Descriptor) -> None: ...

    def on_bytes(self, blob: Digest, count: int) -> None: ...

    def on_reference_done(self, where: ImageReference, warmed: WarmResult) -> None:
        if warmed.error is None:
            typer.echo(f"{where}: {warmed_text(warmed)}")
        else:
            typer.echo(f"entrepot: {where}: {warmed.error}", err=True)


class BarProgress(LineProgress):
    """Shows a bar for each blob that is being fetched, and one for all of them together."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._all = progress.add_task("all", total=0)
        self._blobs: dict[Digest, TaskID] = {}
        self._counts: dict[Digest, int] = {}
        self._total = 0

    def on_blob_wanted(self, where: ImageReference, blob: Descriptor) -> None:
        if blob.digest in self._blobs:
            return
        text = f"{where.repository.rpartition('/')[2]} {blob.digest[:SHORT_DIGEST_LENGTH]}"
        self._blobs[blob.digest] = self._progress.add_task(text, total=blob.size, visible=False)
        self._total += blob.size
        self._progress.update(self._all, total=self._total)

    def on_bytes(self, blob: Digest, count: int) -> None:
        count = max(count, self._counts.get(blob, 0))
        self._counts[blob] = count
        task = self._progress.tasks[self._progress.task_ids.index(self._blobs[blob])]
        self._progress.update(task.id, completed=count, visible=task.total is not None and count < task.total)
        self._progress.update(self._all, completed=sum(self._counts.values()))


@contextmanager
def show_progress() -> Iterator[WarmObserver]:
    """Shows bars when stderr is a terminal, and lines otherwise. Lines appear above the bars."""
    if not sys.stderr.isatty():
        yield LineProgress()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # When stdout is a terminal too, rich prints its lines above the bars. In a file they must stay as they are.
    redirect = sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=redirect) as progress:
        yield BarProgress(progress)


def warmed_text(warmed: WarmResult) -> str:
    """Returns `2 manifests, 5 blobs: 30.1 MiB fetched, 0 B were here`."""
    return (
        f"{plural(warmed.manifests, 'manifest')}, {plural(warmed.blobs, 'blob')}: "
        f"{human_size(warmed.fetched)} fetched, {human_size(warmed.already_stored)} were here"
    )


def total_text(outcomes: list[WarmResult], began: float) -> str:
    """Returns the last line, about all references together. `began` is a time of the monotonic clock."""
    whole = [each for each in outcomes if each.error is None]
    fetched, kept = sum(each.fetched for each in outcomes), sum(each.already_stored for each in outcomes)
    seconds = time.monotonic() - began
    failed = f", {len(outcomes) - len(whole)} not" if len(whole) < len(outcomes) else ""
    return (
        f"{plural(len(whole), 'reference')} here{failed}; {human_size(fetched)} fetched, "
        f"{human_size(kept)} were here before, {seconds:.1f} s"
    )
