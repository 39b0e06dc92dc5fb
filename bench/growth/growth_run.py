"""The bench `growth`: builds stores of several sizes, runs a server for each, and measures one server after the
other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from bench.growth.growth_rows import LOAD_RATES, START_ROW, GrownStore, GrowthTrial, growth_rows, prepare_store
from bench.growth.page_rows import page_rows
from bench.growth.synthetic_store import StoreSize, fill_store
from bench.random_content import make_config, small_layers
from bench.report.goals import growth_goals
from bench.report.measurements import RowSamples
from bench.report.tables import growth_table
from bench.runner import Bench, Options, Rounds, Row, pick_rows
from bench.sized_stores import SizePlan, build_data, served, size_bench
from bench.system.servers import ENTREPOT, ServerProgram

DISK_BYTES_PER_MANIFEST = 6000
"""A generous estimate of the disk space for rows, indexes, and the WAL while the rows are inserted."""
START_COUNT = 3
"""How often the start of a server is measured on each store."""
USUAL_SIZE = 10_000
"""Number of manifests in a store of usual size. The pages of the web UI are compared with their times in this store."""


def growth_bench(options: Options) -> Bench:
    """Returns the bench, ready to run. Raises BenchFailed if the options name an unknown row, or a folder that is not a
    checkout of Entrepot."""
    measure = partial(_measure, options=options, rows=pick_rows([*growth_rows(), *page_rows()], options.only))
    goals = partial(growth_goals, usual=_store_name(USUAL_SIZE) if USUAL_SIZE in options.sizes else None)
    plan = SizePlan(
        "growth", "manifests", DISK_BYTES_PER_MANIFEST, _build, measure, goals, LOAD_RATES, table=growth_table
    )
    return size_bench(options, plan)


def _build(parent: Path, program: ServerProgram, count: int) -> GrownStore:
    """Builds a store: pushes its blobs and one repository to a server of the program, then inserts all other rows."""
    name = _store_name(count) if program is ENTREPOT else f"{_store_name(count)}, {program.name}"
    size, layers, folder = StoreSize(count), small_layers(2), parent / name
    config = make_config(layers)
    cost = build_data(
        f"{name} manifests", program, folder, (config, layers), lambda data: fill_store(data, size, config, layers)
    )
    return GrownStore(name, program, folder, size, config, layers, *cost)


def _store_name(count: int) -> str:
    """Returns the name of Entrepot's store with `count` manifests."""
    return f"{count:,}"


def _measure(stores: Sequence[GrownStore], options: Options, rows: Sequence[Row[GrowthTrial]]) -> list[RowSamples]:
    """Measures `rows`. Measures the start of the servers first, unless the option `--only` names rows."""
    start: list[RowSamples] = []
    if options.only is None:
        start = Rounds([START_ROW], stores, lambda store, _number: contextlib.nullcontext(store)).run(START_COUNT)
    with served(stores, prepare_store) as servers:

        @contextlib.contextmanager
        def open_trial(store: GrownStore, number: int) -> Iterator[GrowthTrial]:
            yield GrowthTrial(store, servers[store.name], options.seconds, number)

        return [*Rounds(rows, stores, open_trial).run(options.rounds), *start]
