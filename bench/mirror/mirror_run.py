"""The bench `mirror`: compares Entrepot as a mirror with docker-registry, or with an older Entrepot. Each trial starts
a new mirror."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from bench.mirror.fill_rows import GROWTH, fill_rows
from bench.mirror.mirror_images import ImageSpec, images_of, push_image
from bench.mirror.mirror_trial import MirrorTrial
from bench.mirror.pull_rows import SENT, pull_rows
from bench.report.goals import MIRROR_GOALS
from bench.report.measurements import CPU_GIB, SECONDS, SPEED, RowSamples
from bench.runner import Bench, Options, Rounds, Row, comparison, pick_rows
from bench.system.machine import DOCKER_REGISTRY_PACKAGES, LOADER_PACKAGES, NGINX_PACKAGES
from bench.system.servers import DOCKER_REGISTRY, ServerProgram, started_server

PLOTTED = (SENT, SECONDS, SPEED, CPU_GIB, GROWTH)
BASE_DISK_BYTES = 2 << 30
"""Bytes of disk that are needed in addition to two copies of the images. The upstream holds one copy, and the mirror of
the current trial holds the other."""
QUICK_DIVISOR = 16
"""The divisor of all layer sizes in a quick run."""


def all_mirror_rows() -> list[Row[MirrorTrial]]:
    """Returns every row, in the order in which they are measured and printed."""
    return [*pull_rows(), *fill_rows()]


def mirror_bench(options: Options) -> Bench:
    """Returns the bench, ready to run. Raises BenchFailed if the options name an unknown row, or a folder that is not a
    checkout of Entrepot."""
    rows = pick_rows(all_mirror_rows(), options.only)
    images = images_of([row.name for row in rows])
    if options.quick:
        images = [image.shrunk(QUICK_DIVISOR) for image in images]
    packages = LOADER_PACKAGES | DOCKER_REGISTRY_PACKAGES | NGINX_PACKAGES
    disk_bytes = BASE_DISK_BYTES + 2 * sum(size for image in images for size in image.layers)
    measure = partial(_measure, rows, images, options.rounds)
    return comparison(options, ("mirror", "mirror-against"), packages, disk_bytes, MIRROR_GOALS, measure, PLOTTED)


def _measure(
    rows: Sequence[Row[MirrorTrial]],
    images: Sequence[ImageSpec],
    rounds: int,
    programs: Sequence[ServerProgram],
    folder: Path,
) -> list[RowSamples]:
    with started_server(DOCKER_REGISTRY, folder / "upstream") as upstream:
        pushed_images = {image.repo: push_image(image, upstream.port, folder) for image in images}

        @contextlib.contextmanager
        def open_trial(program: ServerProgram, _number: int) -> Iterator[MirrorTrial]:
            with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as own_folder:
                yield MirrorTrial(upstream, pushed_images, program, Path(own_folder))

        # Pulls each image once to check its bytes and to bring them into the page cache.
        warm_up_trial = MirrorTrial(upstream, pushed_images, DOCKER_REGISTRY, folder)
        for image in images:
            warm_up_trial.pull(upstream, image)
        return Rounds(rows, programs, open_trial).run(rounds)
