"""Entrepot beside docker-registry: rounds of all rows, the two servers in turn."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import goals
from bench.choice import pick
from bench.content import MIB
from bench.errors import TrialFailed
from bench.figures import PSS, STOLEN
from bench.memory import MemoryWatch
from bench.packages import DOCKER, LOADERS, RIVAL, require, version
from bench.plot import ratio_bars
from bench.processes import stealing
from bench.report import Outcome, publish
from bench.results import Line
from bench.rows import Row, Stage, all_rows
from bench.servers import ENTREPOT, Kind, Server, check_space, machine, running
from bench.servers import RIVAL as RIVAL_KIND

SPACE = 12 << 30
SPACE_A_ROUND = 1 << 30
"""Bytes of disk: what is pushed and logged in a round, and what docker and the fixed content take."""


@dataclass(frozen=True)
class Plan:
    """How a run is to be made."""

    rounds: int
    seconds: float
    rows: Sequence[Row]
    peer: Kind = RIVAL_KIND
    """Entrepot is compared with it."""
    folder: Path | None = None
    """Where the temporary folder is made."""
    json: Path | None = None
    plot: Path | None = None

    @property
    def kinds(self) -> tuple[Kind, Kind]:
        return ENTREPOT, self.peer

    @property
    def names(self) -> tuple[str, str]:
        return ENTREPOT.name, self.peer.name


def chosen(only: str | None) -> list[Row]:
    """The rows of a comma-separated list; all without one. Raises BenchFailed for a name that is none."""
    return pick(all_rows(), only)


def compare(plan: Plan) -> Outcome:
    """Measures, prints and writes it all. Raises BenchFailed."""
    rival = RIVAL if plan.peer is RIVAL_KIND else {}
    needs = {**LOADERS, **rival, **(DOCKER if any(row.name == "docker-pull" for row in plan.rows) else {})}
    require(needs)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=plan.folder))
    try:
        check_space(folder, SPACE + plan.rounds * SPACE_A_ROUND)
        about = _about(plan, folder)
        lines = _measure(plan, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    by_name = {line.name: line for line in lines}
    wanted = goals.GOALS if plan.peer is RIVAL_KIND else goals.no_slower(lines, plan.peer.name)
    return publish(
        lines,
        plan.names,
        about,
        goals.judge(by_name, wanted),
        ratio_bars(lines, *plan.names),
        name="latest" if plan.peer is RIVAL_KIND else "against",
        json=plan.json,
        picture=plan.plot,
    )


def _about(plan: Plan, folder: Path) -> dict[str, object]:
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(folder),
        "versions": {kind.name: kind.version() for kind in plan.kinds}
        | {name: version(name) for name in LOADERS.values()},
        "rounds": plan.rounds,
        "seconds": plan.seconds,
    }


def _measure(plan: Plan, folder: Path) -> list[Line]:
    lines = {row.name: Line(row.name, row.title, row.figures) for row in plan.rows}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(running(kind, folder / kind.name)) for kind in plan.kinds]
        watch = stack.enter_context(MemoryWatch())
        stage = Stage(folder, plan.seconds, plan.kinds, stack)
        for server in servers:
            stage.fill(server)
        for row in plan.rows:
            for server in servers:
                _attempt(lines[row.name], partial(row.prepare, stage, server), server)
        for number in range(plan.rounds):
            _round(plan.rows, lines, stage, servers if number % 2 == 0 else servers[::-1], watch, number)
            print(f"round {number + 1} of {plan.rounds} done", flush=True)
    peak = Line(goals.PEAK, "memory at its peak", (PSS,))
    peak.samples = {name: [{PSS.key: size / MIB}] for name, size in watch.peaks.items()}
    return [*lines.values(), peak]


def _round(
    rows: Sequence[Row], lines: dict[str, Line], stage: Stage, servers: list[Server], watch: MemoryWatch, number: int
) -> None:
    for row in rows:
        line = lines[row.name]
        if row.rounds is not None and number >= row.rounds:
            continue
        for server in servers:
            if line.failure:
                break
            os.sync()  # what one server left to be written must not slow the other
            watch.turn_to(server)
            _attempt(line, partial(_trial, line, row, stage, server, number), server)
    watch.turn_to(None)


def _trial(line: Line, row: Row, stage: Stage, server: Server, number: int) -> None:
    stolen = stealing()
    sample = row.trial(stage, server, number)
    line.samples.setdefault(server.name, []).append({**sample, STOLEN.key: stolen()})


def _attempt(line: Line, step: Callable[[], None], server: Server) -> None:
    """Runs a step of a row; when it fails, the row says so and is not tried again."""
    if line.failure:
        return
    try:
        step()
    except TrialFailed as error:
        line.failure = f"{server.name}: {error}"
        print(f"FAILED {line.name}: {line.failure}", flush=True)
