"""Shows the progress of `entrepot mirror warm`, which fetches images into the cache. Prints a line for each finished
image. In a terminal, also shows a bar for each blob that is being fetched.

`WarmResult` is the result for one image. A *reference* is an image's name with a tag or digest.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from registry.cli.output import human_size, plural, print_line, progress_console
from registry.mirror.warm.warmer import WarmObserver, WarmResult
from storage.content import Descriptor
from storage.names import Digest, ImageReference

SHORT_DIGEST_LENGTH = len("sha256:") + 12
"""Number of characters of a digest that a bar shows: enough to tell the blobs of an image apart."""


class LineProgress(WarmObserver):
    """Prints a line when an image is done: the result on stdout, or the error on stderr."""

    def on_blob_wanted(self, image: ImageReference, blob: Descriptor) -> None:
        """Does nothing, because there are no lines for blobs."""

    def on_bytes(self, blob: Digest, count: int) -> None:
        """Does nothing, because there are no lines for blobs."""

    def on_reference_done(self, image: ImageReference, result: WarmResult) -> None:
        """Prints the line of the image."""
        if result.error is None:
            print_line(f"{image}: {result_text(result)}")
        else:
            print_line(f"entrepot: {image}: {result.error}", err=True)


class BarProgress(LineProgress):
    """Shows a bar for each blob that is being fetched, and one for all blobs together. Prints a line for each image, as
    `LineProgress` does."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._total_task = progress.add_task("all", total=0)
        self._blob_tasks: dict[Digest, TaskID] = {}
        self._fetched_bytes: dict[Digest, int] = {}
        self._total_bytes = 0

    def on_blob_wanted(self, image: ImageReference, blob: Descriptor) -> None:
        """Adds a hidden bar for the blob. Does nothing if the blob has a bar already, because another image has the
        same blob."""
        if blob.digest in self._blob_tasks:
            return
        text = f"{image.repository.rpartition('/')[2]} {blob.digest[:SHORT_DIGEST_LENGTH]}"
        self._blob_tasks[blob.digest] = self._progress.add_task(text, total=blob.size, visible=False)
        self._total_bytes += blob.size
        self._progress.update(self._total_task, total=self._total_bytes)

    def on_bytes(self, blob: Digest, count: int) -> None:
        """Sets the bar of the blob to `count`, the number of bytes received so far. Shows the bar until the blob is
        complete."""
        # A download that starts again reports smaller counts than before. A bar must not move back.
        count = max(count, self._fetched_bytes.get(blob, 0))
        self._fetched_bytes[blob] = count
        task = self._progress.tasks[self._progress.task_ids.index(self._blob_tasks[blob])]
        self._progress.update(task.id, completed=count, visible=task.total is not None and count < task.total)
        self._progress.update(self._total_task, completed=sum(self._fetched_bytes.values()))


@contextmanager
def show_progress() -> Iterator[WarmObserver]:
    """Context manager that yields an observer for the warmer. The observer shows bars and lines if stderr is a
    terminal; otherwise it shows only lines. The bars disappear at the end of the block."""
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
    # With `redirect_stdout`, rich prints the lines on stderr, above the bars. If stdout is not a terminal, the lines
    # must stay on stdout.
    redirect_stdout = sys.stdout.isatty()
    with Progress(*columns, console=progress_console(), transient=True, redirect_stdout=redirect_stdout) as progress:
        yield BarProgress(progress)


def result_text(result: WarmResult) -> str:
    """Returns the text of an image's line, such as `2 manifests, 5 blobs: 30.1 MiB fetched, 0 B already cached`."""
    return (
        f"{plural(result.manifests, 'manifest')}, {plural(result.blobs, 'blob')}: "
        f"{human_size(result.fetched)} fetched, {human_size(result.already_stored)} already cached"
    )


def total_text(results: list[WarmResult], start_time: float) -> str:
    """Returns the text of the last line, which sums up all images, such as `2 references cached, 1 failed; 30.1 MiB
    fetched, 0 B already cached, 7.4 s`. `start_time`: the value of `time.monotonic()` when the command began to
    fetch."""
    successes = sum(result.error is None for result in results)
    fetched, already_stored = (
        sum(result.fetched for result in results),
        sum(result.already_stored for result in results),
    )
    seconds = time.monotonic() - start_time
    failures = f", {len(results) - successes} failed" if successes < len(results) else ""
    return (
        f"{plural(successes, 'reference')} cached{failures}; {human_size(fetched)} fetched, "
        f"{human_size(already_stored)} already cached, {seconds:.1f} s"
    )
