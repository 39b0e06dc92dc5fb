"""Builds the stores, serves them side by side, and measures them in turn."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.growth.growth_trials import (
    BASE_REPO,
    CATALOG_PAGE,
    GROWTH_FIGURES,
    HOT_MANIFESTS,
    SPREAD_MANIFESTS,
    START_TIME,
    TAG_PUTS,
    TAGS_PAGE,
    GrownStore,
    check_store,
    prepare_store,
    run_growth_trial,
)
from bench.growth.synthetic_store import StoreSize, fill_store
from bench.loaders.http_client import HttpClient
from bench.random_content import CONFIG_TYPE, SMALL_SIZE, make_blob, make_manifest
from bench.report import measurements, tables
from bench.report.goals import Goal, GoalResult, are_all_met
from bench.report.measurements import RowSamples, spread
from bench.report.plot import curves
from bench.system.machine import require_packages
from bench.system.servers import ENTREPOT, check_space, describe_machine, started_server

DISK_BYTES_PER_MANIFEST = 6000
"""Bytes of disk, generously: rows, indexes, the WAL while they are made."""
MAX_SLOWDOWN = 1.3
START_COUNT = 3


@dataclass(frozen=True)
class GrowthPlan:
    """How a run is to be made."""

    rounds: int
    seconds: float
    sizes: Sequence[int]
    folder: Path | None = None
    json: Path | None = None
    plot: Path | None = None


def measure_growth(plan: GrowthPlan) -> bool:
    """Measures, prints and writes it all; whether the goals are met. Raises BenchFailed, TrialFailed."""
    require_packages({"wrk": "wrk"})
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=plan.folder))
    try:
        check_space(folder, (1 << 30) + DISK_BYTES_PER_MANIFEST * sum(plan.sizes))
        about: dict[str, object] = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": describe_machine(folder),
        }
        grown = [_build(folder / str(size), StoreSize(size)) for size in plan.sizes]
        about["stores"] = {one.name: {"bytes": one.disk, "built_in": one.seconds} for one in grown}
        lines = _measure(plan, grown)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _report(plan, grown, lines, about)


def _build(folder: Path, size: StoreSize) -> GrownStore:
    """A store of that size; its blobs and its first repository come through the API."""
    layers = tuple(make_blob(os.urandom(SMALL_SIZE)) for _ in range(2))
    config = make_blob(b'{"architecture":"amd64","os":"linux"}', CONFIG_TYPE)
    folder.mkdir(parents=True)
    begun = time.perf_counter()
    with started_server(ENTREPOT, folder) as server, HttpClient(server.port) as client:
        for each in (config, *layers):
            client.push_blob(BASE_REPO, each.digest, each.content)
        client.put_manifest(BASE_REPO, "latest", make_manifest(config, layers))
    fill_store(folder / "data", size, config, layers)
    seconds = time.perf_counter() - begun
    disk = sum(path.stat().st_blocks * 512 for path in (folder / "data").rglob("*") if path.is_file())
    print(f"{size.manifests:,} manifests: {disk / (1 << 20):,.0f} MiB, made in {seconds:.0f} s", flush=True)
    return GrownStore(folder, size, config, layers, disk, seconds)


def _measure(plan: GrowthPlan, grown: Sequence[GrownStore]) -> list[RowSamples]:
    lines = [RowSamples(figure.key, title, (figure,)) for figure, title in GROWTH_FIGURES]
    by_key = {line.name: line for line in lines}

    def note(one: GrownStore, key: str, value: float) -> None:
        by_key[key].samples.setdefault(one.name, []).append({key: value})

    for number in range(START_COUNT * len(grown)):
        one = grown[number % len(grown)]
        with started_server(ENTREPOT, one.folder) as server:
            note(one, START_TIME.key, server.start_seconds)
    with contextlib.ExitStack() as stack:
        served = [(one, stack.enter_context(started_server(ENTREPOT, one.folder))) for one in grown]
        for one, server in served:
            check_store(one, server)
            prepare_store(one, server)
        for number in range(plan.rounds):
            for one, server in served if number % 2 == 0 else reversed(served):
                run_growth_trial(one, server, plan.seconds, number, partial(note, one))
            print(f"round {number + 1} of {plan.rounds} done", flush=True)
    return lines


def _goals(smallest: str, largest: str, lines: dict[str, RowSamples]) -> list[GoalResult]:
    """Rates of the largest store against the smallest; pages and start of the largest alone."""

    def most(key: str, text: str, limit: float) -> GoalResult:
        return Goal(key, key, text, limit, at_least=False, relative=False), lines[key].median(largest, key)

    def slower(key: str, text: str) -> GoalResult:
        return Goal(key, key, text, MAX_SLOWDOWN, at_least=False, relative=True), lines[key].ratio(
            smallest, largest, key
        )

    return [
        slower(HOT_MANIFESTS.key, "the same hundred manifests, slower by"),
        slower(SPREAD_MANIFESTS.key, "manifests all over, beside tag PUTs, slower by"),
        slower(TAG_PUTS.key, "tag PUT, slower by"),
        most(TAGS_PAGE.key, "page of 100 tags, ms", 5),
        most(CATALOG_PAGE.key, "page of 100 repositories, ms", 5),
        most(START_TIME.key, "ready to serve, s", 2),
    ]


def _report(plan: GrowthPlan, grown: Sequence[GrownStore], lines: list[RowSamples], about: dict[str, object]) -> bool:
    names = [one.name for one in grown]
    by_key = {line.name: line for line in lines}
    series = {line.title: [spread(line.values(name, line.figures[0])).median for name in names] for line in lines}
    plot = curves("As the store grows, against the smallest", [one.size.manifests for one in grown], series)
    measurements.write_json(
        measurements.results_document(lines, names, about),
        [measurements.RESULTS_FOLDER / "growth.json", *filter(None, [plan.json])],
    )
    for path in (measurements.RESULTS_FOLDER / "growth.svg", *filter(None, [plan.plot])):
        path.write_text(plot)
    verdicts = _goals(names[0], names[-1], by_key)
    print(f"\n{tables.growth_table(lines, names)}\n\n{tables.goals_table(verdicts)}")
    return are_all_met(verdicts)
