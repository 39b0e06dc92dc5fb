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

from bench.choice import pick
from bench.errors import BenchFailed, TrialFailed
from bench.figures import CPU_GIB, SECONDS, SPEED
from bench.goals import judge, no_slower
from bench.mirror.fill_rows import GROWTH, BesideFill, Fill, FillMemory, FirstByte
from bench.mirror.goals import GOALS
from bench.mirror.images import PRIME, Image, push
from bench.mirror.mirrors import OURS, PEER, MirrorKind
from bench.mirror.pull_rows import SENT, Cold, Thundering, Warm, direct, limited, paced
from bench.mirror.stage import MirrorRow, Stage
from bench.packages import GATE, LOADERS, RIVAL, require, version
from bench.plot import ratio_bars
from bench.report import Outcome, publish
from bench.results import Line
from bench.servers import RIVAL as UPSTREAM
from bench.servers import check_space, machine, running

DRAWN = (SENT, SECONDS, SPEED, CPU_GIB, GROWTH)
SPACE = 2 << 30
"""Bytes of disk beside the images, which the upstream holds and a mirror as well."""
QUICK = 16
"""By how much images are smaller in a quick run."""


@dataclass(frozen=True)
class Plan:
    """How a run is to be made."""

    rounds: int
    rows: Sequence[MirrorRow]
    peer: MirrorKind = PEER
    """Entrepot is compared with it."""
    quick: bool = False
    folder: Path | None = None
    """Where the temporary folder is made."""
    json: Path | None = None
    plot: Path | None = None

    @property
    def mirrors(self) -> tuple[MirrorKind, MirrorKind]:
        return OURS, self.peer


def all_rows() -> list[MirrorRow]:
    """Every row, in the order in which they are measured and printed."""
    image = "cold pull of 200 MiB"
    return [
        Thundering(),
        Cold("slow-link", f"{image}, 8 MiB/s a request", limited),
        Cold("paced-link", f"{image}, 8 MiB/s a connection", paced),
        Cold("fast-link", f"{image}, unthrottled", direct, (SECONDS, CPU_GIB)),
        Warm(),
        FirstByte(),
        Fill(),
        BesideFill("hosted-beside-fill", "hosted manifest beside a fill of 2 GiB", hosted=True),
        BesideFill("cached-beside-fill", "mirrored manifest beside a fill of 2 GiB", hosted=False),
        FillMemory(),
    ]


def chosen(only: str | None) -> list[MirrorRow]:
    """The rows of a comma-separated list; all without one. Raises BenchFailed for a name that is none."""
    return pick(all_rows(), only)


def compare(plan: Plan) -> Outcome:
    """Measures, prints and writes it all. Raises BenchFailed, TrialFailed."""
    require({**LOADERS, **RIVAL, **GATE})
    images = {image.repo: image for row in plan.rows for image in (PRIME, *row.images)}
    wanted = [image.shrunk(QUICK) if plan.quick else image for image in images.values()]
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=plan.folder))
    try:
        check_space(folder, SPACE + 2 * sum(size for image in wanted for size in image.layers))
        about = _about(plan, folder)
        with _upstream(folder, wanted) as stage:
            lines = _measure(plan, stage)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    names = [mirror.name for mirror in plan.mirrors]
    verdicts = judge({line.name: line for line in lines}, GOALS if plan.peer is PEER else no_slower(lines, names[1]))
    plot = ratio_bars(lines, *names, drawn=DRAWN)
    name = "mirror" if plan.peer is PEER else "mirror-against"
    return publish(lines, names, about, verdicts, plot, name=name, json=plan.json, picture=plan.plot)


def _about(plan: Plan, folder: Path) -> dict[str, object]:
    programs = [*LOADERS.values(), *GATE.values()]
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(folder),
        "versions": {each.name: each.version() for each in plan.mirrors} | {name: version(name) for name in programs},
        "rounds": plan.rounds,
        "quick": plan.quick,
    }


@contextlib.contextmanager
def _upstream(folder: Path, images: Sequence[Image]) -> Iterator[Stage]:
    """A docker-registry that holds the images. Each is pulled from it once: to see that its bytes are right, and so
    that they come from the page cache from then on."""
    with running(UPSTREAM, folder / "upstream") as origin:
        stage = Stage(origin, {image.repo: push(image, origin.port, folder) for image in images}, folder)
        for image in images:
            stage.pull(origin, image)
        yield stage


def _measure(plan: Plan, stage: Stage) -> list[Line]:
    lines = {row.name: Line(row.name, row.title, row.figures) for row in plan.rows}
    for number in range(plan.rounds):
        for row in plan.rows:
            for mirror in plan.mirrors if number % 2 == 0 else plan.mirrors[::-1]:
                if mirror is PEER and row.peer_rounds is not None and number >= row.peer_rounds:
                    continue
                _trial(lines[row.name], row, stage, mirror)
        print(f"round {number + 1} of {plan.rounds} done", flush=True)
    return list(lines.values())


def _trial(line: Line, row: MirrorRow, stage: Stage, mirror: MirrorKind) -> None:
    """One, in a folder of its own. When it fails, the row says so and is not tried again."""
    if line.failure:
        return
    os.sync()  # what one trial left to be written must not slow the next
    with tempfile.TemporaryDirectory(dir=stage.folder, ignore_cleanup_errors=True) as folder:
        try:
            sample = row.trial(Stage(stage.origin, stage.held, Path(folder)), mirror)
        except (TrialFailed, BenchFailed) as error:
            line.failure = f"{mirror.name}: {error}"
            print(f"FAILED {line.name}: {line.failure}", flush=True)
        else:
            line.samples.setdefault(mirror.name, []).append(sample)
