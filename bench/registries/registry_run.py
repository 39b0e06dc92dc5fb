"""Entrepot beside docker-registry: rounds of all rows, the two servers in turn.

The rows of the table: each knows how to make one trial against one server.
"""

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

from bench.comparison import RunOutcome, pick_rows, publish_results
from bench.errors import TrialFailed
from bench.random_content import MIB
from bench.registries.fresh_server_rows import BearerRow, LoginStormRow, StartRow
from bench.registries.request_rows import HeadRow, RequestRow, TagPutRow, request_target
from bench.registries.transfer_rows import BulkPullRow, BulkPushRow, DockerPullRow, UnderBulkRow
from bench.registries.trial_setup import Row, TrialSetup
from bench.report import goals
from bench.report.measurements import PSS, STEAL, RowSamples
from bench.report.plot import ratio_bars
from bench.system.machine import (
    DOCKER_PACKAGES,
    DOCKER_REGISTRY_PACKAGES,
    LOADER_PACKAGES,
    package_version,
    require_packages,
)
from bench.system.process_tree import start_steal_meter
from bench.system.servers import DOCKER_REGISTRY as RIVAL_KIND
from bench.system.servers import (
    ENTREPOT,
    PeakMemory,
    RunningServer,
    ServerProgram,
    check_space,
    describe_machine,
    started_server,
)

__all__ = ["Row", "TrialSetup", "all_rows"]

BASE_DISK_BYTES = 12 << 30
ROUND_DISK_BYTES = 1 << 30
"""Bytes of disk: what is pushed and logged in a round, and what docker and the fixed content take."""


@dataclass(frozen=True)
class RegistryPlan:
    """How a run is to be made."""

    rounds: int
    seconds: float
    rows: Sequence[Row]
    peer: ServerProgram = RIVAL_KIND
    """Entrepot is compared with it."""
    folder: Path | None = None
    """Where the temporary folder is made."""
    json: Path | None = None
    plot: Path | None = None

    @property
    def kinds(self) -> tuple[ServerProgram, ServerProgram]:
        return ENTREPOT, self.peer

    @property
    def names(self) -> tuple[str, str]:
        return ENTREPOT.name, self.peer.name


def chosen_rows(only: str | None) -> list[Row]:
    """The rows of a comma-separated list; all without one. Raises BenchFailed for a name that is none."""
    return pick_rows(all_rows(), only)


def compare_registries(plan: RegistryPlan) -> RunOutcome:
    """Measures, prints and writes it all. Raises BenchFailed."""
    rival = DOCKER_REGISTRY_PACKAGES if plan.peer is RIVAL_KIND else {}
    needs = {
        **LOADER_PACKAGES,
        **rival,
        **(DOCKER_PACKAGES if any(row.name == "docker-pull" for row in plan.rows) else {}),
    }
    require_packages(needs)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=plan.folder))
    try:
        check_space(folder, BASE_DISK_BYTES + plan.rounds * ROUND_DISK_BYTES)
        about = _about(plan, folder)
        lines = _measure(plan, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    by_name = {line.name: line for line in lines}
    wanted = goals.REGISTRY_GOALS if plan.peer is RIVAL_KIND else goals.no_slower_goals(lines, plan.peer.name)
    return publish_results(
        lines,
        plan.names,
        about,
        goals.judge_goals(by_name, wanted),
        ratio_bars(lines, *plan.names),
        name="latest" if plan.peer is RIVAL_KIND else "against",
        json=plan.json,
        picture=plan.plot,
    )


def _about(plan: RegistryPlan, folder: Path) -> dict[str, object]:
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": describe_machine(folder),
        "versions": {kind.name: kind.version() for kind in plan.kinds}
        | {name: package_version(name) for name in LOADER_PACKAGES.values()},
        "rounds": plan.rounds,
        "seconds": plan.seconds,
    }


def _measure(plan: RegistryPlan, folder: Path) -> list[RowSamples]:
    lines = {row.name: RowSamples(row.name, row.title, row.figures) for row in plan.rows}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(started_server(kind, folder / kind.name)) for kind in plan.kinds]
        watch = stack.enter_context(PeakMemory())
        stage = TrialSetup(folder, plan.seconds, plan.kinds, stack)
        for server in servers:
            stage.fill(server)
        for row in plan.rows:
            for server in servers:
                _attempt(lines[row.name], partial(row.prepare, stage, server), server)
        for number in range(plan.rounds):
            _round(plan.rows, lines, stage, servers if number % 2 == 0 else servers[::-1], watch, number)
            print(f"round {number + 1} of {plan.rounds} done", flush=True)
    peak = RowSamples(goals.PEAK_MEMORY_ROW, "memory at its peak", (PSS,))
    peak.samples = {name: [{PSS.key: size / MIB}] for name, size in watch.peaks.items()}
    return [*lines.values(), peak]


def _round(
    rows: Sequence[Row],
    lines: dict[str, RowSamples],
    stage: TrialSetup,
    servers: list[RunningServer],
    watch: PeakMemory,
    number: int,
) -> None:
    for row in rows:
        line = lines[row.name]
        if row.rounds is not None and number >= row.rounds:
            continue
        for server in servers:
            if line.failure:
                break
            os.sync()  # what one server left to be written must not slow the other
            watch.watch_server(server)
            _attempt(line, partial(_trial, line, row, stage, server, number), server)
    watch.watch_server(None)


def _trial(line: RowSamples, row: Row, stage: TrialSetup, server: RunningServer, number: int) -> None:
    stolen = start_steal_meter()
    sample = row.trial(stage, server, number)
    line.samples.setdefault(server.name, []).append({**sample, STEAL.key: stolen()})


def _attempt(line: RowSamples, step: Callable[[], None], server: RunningServer) -> None:
    """Runs a step of a row; when it fails, the row says so and is not tried again."""
    if line.failure:
        return
    try:
        step()
    except TrialFailed as error:
        line.failure = f"{server.name}: {error}"
        print(f"FAILED {line.name}: {line.failure}", flush=True)


def all_rows() -> list[Row]:
    """Every row, in the order in which they are measured and printed."""
    return [
        StartRow(),
        RequestRow("v2", "GET /v2/", request_target("v2")),
        RequestRow("manifest-tag", "manifest by tag", request_target("tag")),
        BearerRow(),
        RequestRow("manifest-digest", "manifest by digest", request_target("digest")),
        HeadRow("head-tag", "HEAD manifest by tag", request_target("tag")),
        HeadRow("head-digest", "HEAD manifest by digest", request_target("digest")),
        RequestRow("blob-4k", "blob of 4 KiB", request_target("blob")),
        HeadRow("head-blob", "HEAD blob of 4 KiB", request_target("blob")),
        RequestRow("tags-list", "tags list, 300 tags", request_target("tags")),
        TagPutRow(),
        BulkPullRow("blob-256m", "blob of 256 MiB", 1),
        BulkPullRow("blob-256m-x4", "blob of 256 MiB, 4 at once", 4),
        UnderBulkRow(),
        # After the latency rows: the memory that it frees goes back to the host, which costs processor time.
        BulkPushRow(),
        DockerPullRow(),
        LoginStormRow(),
    ]
