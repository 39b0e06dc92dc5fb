"""Rounds of all rows, the two mirrors in turn; each trial has a fresh mirror with an empty folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.comparison import RunOutcome, pick_rows, publish_results
from bench.errors import BenchFailed, TrialFailed
from bench.mirror.mirror_fill_rows import GROWTH, BesideFillRow, FillMemoryRow, FillRow, FirstByteRow
from bench.mirror.mirror_images import WARM_UP_IMAGE, ImageSpec, push_image
from bench.mirror.mirror_pull_rows import (
    SENT,
    ColdPullRow,
    ThunderingHerdRow,
    WarmPullRow,
    connection_paced_link,
    direct_link,
    request_limited_link,
)
from bench.mirror.mirror_servers import DOCKER_REGISTRY_AS_MIRROR, ENTREPOT_AS_MIRROR, MirrorProgram
from bench.mirror.mirror_setup import MirrorRow, MirrorSetup
from bench.report.goals import MIRROR_GOALS, judge_goals, no_slower_goals
from bench.report.measurements import CPU_GIB, SECONDS, SPEED, RowSamples
from bench.report.plot import ratio_bars
from bench.system.machine import (
    DOCKER_REGISTRY_PACKAGES,
    LOADER_PACKAGES,
    NGINX_PACKAGES,
    package_version,
    require_packages,
)
from bench.system.servers import DOCKER_REGISTRY as UPSTREAM
from bench.system.servers import check_space, describe_machine, started_server

PLOTTED = (SENT, SECONDS, SPEED, CPU_GIB, GROWTH)
BASE_DISK_BYTES = 2 << 30
"""Bytes of disk beside the images, which the upstream holds and a mirror as well."""
QUICK_DIVISOR = 16
"""By how much images are smaller in a quick run."""


@dataclass(frozen=True)
class MirrorPlan:
    """How a run is to be made."""

    rounds: int
    rows: Sequence[MirrorRow]
    peer: MirrorProgram = DOCKER_REGISTRY_AS_MIRROR
    """Entrepot is compared with it."""
    quick: bool = False
    folder: Path | None = None
    """Where the temporary folder is made."""
    json: Path | None = None
    plot: Path | None = None

    @property
    def mirrors(self) -> tuple[MirrorProgram, MirrorProgram]:
        return ENTREPOT_AS_MIRROR, self.peer


def all_mirror_rows() -> list[MirrorRow]:
    """Every row, in the order in which they are measured and printed."""
    image = "cold pull of 200 MiB"
    return [
        ThunderingHerdRow(),
        ColdPullRow("slow-link", f"{image}, 8 MiB/s a request", request_limited_link),
        ColdPullRow("paced-link", f"{image}, 8 MiB/s a connection", connection_paced_link),
        ColdPullRow("fast-link", f"{image}, unthrottled", direct_link, (SECONDS, CPU_GIB)),
        WarmPullRow(),
        FirstByteRow(),
        FillRow(),
        BesideFillRow("hosted-beside-fill", "hosted manifest beside a fill of 2 GiB", hosted=True),
        BesideFillRow("cached-beside-fill", "mirrored manifest beside a fill of 2 GiB", hosted=False),
        FillMemoryRow(),
    ]


def chosen_mirror_rows(only: str | None) -> list[MirrorRow]:
    """The rows of a comma-separated list; all without one. Raises BenchFailed for a name that is none."""
    return pick_rows(all_mirror_rows(), only)


def compare_mirrors(plan: MirrorPlan) -> RunOutcome:
    """Measures, prints and writes it all. Raises BenchFailed, TrialFailed."""
    require_packages({**LOADER_PACKAGES, **DOCKER_REGISTRY_PACKAGES, **NGINX_PACKAGES})
    images = {image.repo: image for row in plan.rows for image in (WARM_UP_IMAGE, *row.images)}
    wanted = [image.shrunk(QUICK_DIVISOR) if plan.quick else image for image in images.values()]
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=plan.folder))
    try:
        check_space(folder, BASE_DISK_BYTES + 2 * sum(size for image in wanted for size in image.layers))
        about = _about(plan, folder)
        with _upstream(folder, wanted) as stage:
            lines = _measure(plan, stage)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    names = [mirror.name for mirror in plan.mirrors]
    verdicts = judge_goals(
        {line.name: line for line in lines},
        MIRROR_GOALS if plan.peer is DOCKER_REGISTRY_AS_MIRROR else no_slower_goals(lines, names[1]),
    )
    plot = ratio_bars(lines, *names, drawn=PLOTTED)
    name = "mirror" if plan.peer is DOCKER_REGISTRY_AS_MIRROR else "mirror-against"
    return publish_results(lines, names, about, verdicts, plot, name=name, json=plan.json, picture=plan.plot)


def _about(plan: MirrorPlan, folder: Path) -> dict[str, object]:
    programs = [*LOADER_PACKAGES.values(), *NGINX_PACKAGES.values()]
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": describe_machine(folder),
        "versions": {each.name: each.version() for each in plan.mirrors}
        | {name: package_version(name) for name in programs},
        "rounds": plan.rounds,
        "quick": plan.quick,
    }


@contextlib.contextmanager
def _upstream(folder: Path, images: Sequence[ImageSpec]) -> Iterator[MirrorSetup]:
    """A docker-registry that holds the images. Each is pulled from it once: to see that its bytes are right, and so
    that they come from the page cache from then on."""
    with started_server(UPSTREAM, folder / "upstream") as origin:
        stage = MirrorSetup(origin, {image.repo: push_image(image, origin.port, folder) for image in images}, folder)
        for image in images:
            stage.pull(origin, image)
        yield stage


def _measure(plan: MirrorPlan, stage: MirrorSetup) -> list[RowSamples]:
    lines = {row.name: RowSamples(row.name, row.title, row.figures) for row in plan.rows}
    for number in range(plan.rounds):
        for row in plan.rows:
            for mirror in plan.mirrors if number % 2 == 0 else plan.mirrors[::-1]:
                if (
                    mirror is DOCKER_REGISTRY_AS_MIRROR
                    and row.max_peer_rounds is not None
                    and number >= row.max_peer_rounds
                ):
                    continue
                _trial(lines[row.name], row, stage, mirror)
        print(f"round {number + 1} of {plan.rounds} done", flush=True)
    return list(lines.values())


def _trial(line: RowSamples, row: MirrorRow, stage: MirrorSetup, mirror: MirrorProgram) -> None:
    """One, in a folder of its own. When it fails, the row says so and is not tried again."""
    if line.failure:
        return
    os.sync()  # what one trial left to be written must not slow the next
    with tempfile.TemporaryDirectory(dir=stage.folder, ignore_cleanup_errors=True) as folder:
        try:
            sample = row.trial(MirrorSetup(stage.origin, stage.held, Path(folder)), mirror)
        except (TrialFailed, BenchFailed) as error:
            line.failure = f"{mirror.name}: {error}"
            print(f"FAILED {line.name}: {line.failure}", flush=True)
        else:
            line.samples.setdefault(mirror.name, []).append(sample)
