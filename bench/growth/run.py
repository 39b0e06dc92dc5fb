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

from bench import results, table
from bench.content import CONFIG_TYPE, SMALL, blob, manifest
from bench.figures import spread
from bench.goals import Goal, Verdict, all_met
from bench.growth.store import Size, grow
from bench.growth.trials import (
    BASE,
    CATALOG,
    FIGURES,
    HUNDRED,
    MANIFEST,
    PUT,
    START,
    TAGS,
    Grown,
    check,
    prepare,
    trial,
)
from bench.packages import require
from bench.plot import curves
from bench.results import Line
from bench.servers import ENTREPOT, check_space, machine, running
from bench.wire import Client

SPACE_A_MANIFEST = 6000
"""Bytes of disk, generously: rows, indexes, the WAL while they are made."""
FACTOR = 1.3
STARTS = 3


@dataclass(frozen=True)
class Plan:
    """How a run is to be made."""

    rounds: int
    seconds: float
    sizes: Sequence[int]
    folder: Path | None = None
    json: Path | None = None
    plot: Path | None = None


def measure(plan: Plan) -> bool:
    """Measures, prints and writes it all; whether the goals are met. Raises BenchFailed, TrialFailed."""
    require({"wrk": "wrk"})
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=plan.folder))
    try:
        check_space(folder, (1 << 30) + SPACE_A_MANIFEST * sum(plan.sizes))
        about: dict[str, object] = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine(folder),
        }
        grown = [_build(folder / str(size), Size(size)) for size in plan.sizes]
        about["stores"] = {one.name: {"bytes": one.disk, "built_in": one.seconds} for one in grown}
        lines = _measure(plan, grown)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _report(plan, grown, lines, about)


def _build(folder: Path, size: Size) -> Grown:
    """A store of that size; its blobs and its first repository come through the API."""
    layers = tuple(blob(os.urandom(SMALL)) for _ in range(2))
    config = blob(b'{"architecture":"amd64","os":"linux"}', CONFIG_TYPE)
    folder.mkdir(parents=True)
    begun = time.perf_counter()
    with running(ENTREPOT, folder) as server, Client(server.port) as client:
        for each in (config, *layers):
            client.push_blob(BASE, each.digest, each.content)
        client.put_manifest(BASE, "latest", manifest(config, layers))
    grow(folder / "data", size, config, layers)
    seconds = time.perf_counter() - begun
    disk = sum(path.stat().st_blocks * 512 for path in (folder / "data").rglob("*") if path.is_file())
    print(f"{size.manifests:,} manifests: {disk / (1 << 20):,.0f} MiB, made in {seconds:.0f} s", flush=True)
    return Grown(folder, size, config, layers, disk, seconds)


def _measure(plan: Plan, grown: Sequence[Grown]) -> list[Line]:
    lines = [Line(figure.key, title, (figure,)) for figure, title in FIGURES]
    by_key = {line.name: line for line in lines}

    def note(one: Grown, key: str, value: float) -> None:
        by_key[key].samples.setdefault(one.name, []).append({key: value})

    for number in range(STARTS * len(grown)):
        one = grown[number % len(grown)]
        with running(ENTREPOT, one.folder) as server:
            note(one, START.key, server.started_in)
    with contextlib.ExitStack() as stack:
        served = [(one, stack.enter_context(running(ENTREPOT, one.folder))) for one in grown]
        for one, server in served:
            check(one, server)
            prepare(one, server)
        for number in range(plan.rounds):
            for one, server in served if number % 2 == 0 else reversed(served):
                trial(one, server, plan.seconds, number, partial(note, one))
            print(f"round {number + 1} of {plan.rounds} done", flush=True)
    return lines


def _goals(smallest: str, largest: str, lines: dict[str, Line]) -> list[Verdict]:
    """Rates of the largest store against the smallest; pages and start of the largest alone."""

    def most(key: str, text: str, limit: float) -> Verdict:
        return Goal(key, key, text, limit, at_least=False, relative=False), lines[key].median(largest, key)

    def slower(key: str, text: str) -> Verdict:
        return Goal(key, key, text, FACTOR, at_least=False, relative=True), lines[key].ratio(smallest, largest, key)

    return [
        slower(HUNDRED.key, "the same hundred manifests, slower by"),
        slower(MANIFEST.key, "manifests all over, beside tag PUTs, slower by"),
        slower(PUT.key, "tag PUT, slower by"),
        most(TAGS.key, "page of 100 tags, ms", 5),
        most(CATALOG.key, "page of 100 repositories, ms", 5),
        most(START.key, "ready to serve, s", 2),
    ]


def _report(plan: Plan, grown: Sequence[Grown], lines: list[Line], about: dict[str, object]) -> bool:
    names = [one.name for one in grown]
    by_key = {line.name: line for line in lines}
    series = {line.title: [spread(line.values(name, line.figures[0])).median for name in names] for line in lines}
    plot = curves("As the store grows, against the smallest", [one.size.manifests for one in grown], series)
    results.write(results.as_json(lines, names, about), [results.FOLDER / "growth.json", *filter(None, [plan.json])])
    for path in (results.FOLDER / "growth.svg", *filter(None, [plan.plot])):
        path.write_text(plot)
    verdicts = _goals(names[0], names[-1], by_key)
    print(f"\n{table.growth(lines, names)}\n\n{table.verdicts(verdicts)}")
    return all_met(verdicts)
