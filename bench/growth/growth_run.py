"""Builds stores of growing size, serves them side by side, and measures them in turn."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from bench.growth.growth_rows import LOAD_RATES, START_ROW, GrownStore, GrowthTrial, growth_rows, prepare_store
from bench.growth.synthetic_store import StoreSize, fill_store
from bench.loaders.http_client import HttpClient
from bench.random_content import MIB, make_config, push_content, small_layers
from bench.report.goals import growth_goals
from bench.report.measurements import RowSamples
from bench.report.plot import curves
from bench.report.tables import growth_table
from bench.runner import Bench, Findings, Options, Rounds, comparison
from bench.system.servers import ENTREPOT, RunningServer, ServerProgram, started_server

PACKAGES = {"wrk": "wrk"}
BASE_REPO = "base/app"
BASE_DISK_BYTES = 1 << 30
DISK_BYTES_PER_MANIFEST = 6000
"""A generous estimate: rows, indexes, and the WAL while they are inserted."""
START_COUNT = 3


def growth_bench(options: Options) -> Bench:
    """Returns the bench. With another checkout, each program has stores of all sizes, and each row is compared at each
    size. Raises BenchFailed for a folder that is not a checkout."""
    disk_bytes = BASE_DISK_BYTES + DISK_BYTES_PER_MANIFEST * sum(options.sizes)
    if options.against:
        measure = partial(_measure_by_size, options)
        return comparison(options, ("growth", "growth-against"), PACKAGES, 2 * disk_bytes, (), measure, LOAD_RATES)

    def find(folder: Path) -> Findings:
        stores = [_build(folder, ENTREPOT, StoreSize(size)) for size in options.sizes]
        lines, names = _measure(stores, options), [one.name for one in stores]
        about = {"stores": {one.name: {"bytes": one.disk_bytes, "built_in": one.build_seconds} for one in stores}}
        series = {line.title: [line.median(name, line.figures[0].key) or 0 for name in names] for line in lines}
        plot = curves("As the store grows, against the smallest", options.sizes, series)
        return Findings(lines, names, growth_goals(names[0], names[-1]), plot, about, growth_table)

    return Bench("growth", [ENTREPOT], PACKAGES, disk_bytes, find)


def _measure_by_size(options: Options, programs: Sequence[ServerProgram], folder: Path) -> list[RowSamples]:
    """Measures stores of all programs. Returns a row for each figure and size, with samples by program."""
    stores = [_build(folder, program, StoreSize(size)) for size in options.sizes for program in programs]
    split = list[RowSamples]()
    for line in _measure(stores, options):
        for size in options.sizes:
            same_size = [store for store in stores if store.size.manifests == size]
            samples = {store.program.name: line.samples.get(store.name, []) for store in same_size}
            title = f"{line.title}, {size:,} manifests"
            split.append(RowSamples(f"{line.name}-{size}", title, line.figures, samples, line.failure))
    return split


def _build(parent: Path, program: ServerProgram, size: StoreSize) -> GrownStore:
    """Builds a store: pushes its blobs and first repository to the program's server, then inserts the other rows."""
    name = f"{size.manifests:,}" if program is ENTREPOT else f"{size.manifests:,}, {program.name}"
    layers = small_layers(2)
    config, folder = make_config(layers), parent / name
    begun = time.perf_counter()
    with started_server(program, folder) as server, HttpClient(server.port) as client:
        push_content(client, BASE_REPO, "latest", config, layers)
    fill_store(folder / "data", size, config, layers)
    seconds = time.perf_counter() - begun
    disk = sum(path.stat().st_blocks * 512 for path in (folder / "data").rglob("*") if path.is_file())
    print(f"{name} manifests: {disk / MIB:,.0f} MiB, made in {seconds:.0f} s", flush=True)
    return GrownStore(name, program, folder, size, config, layers, disk, seconds)


def _measure(stores: Sequence[GrownStore], options: Options) -> list[RowSamples]:
    start = Rounds([START_ROW], stores, lambda store, _number: contextlib.nullcontext(store)).run(START_COUNT)
    with contextlib.ExitStack() as stack:
        servers: dict[str, RunningServer] = {}
        for store in stores:
            servers[store.name] = stack.enter_context(started_server(store.program, store.folder))
            prepare_store(store, servers[store.name])

        @contextlib.contextmanager
        def open_trial(store: GrownStore, number: int) -> Iterator[GrowthTrial]:
            yield GrowthTrial(store, servers[store.name], options.seconds, number)

        return [*Rounds(growth_rows(), stores, open_trial).run(options.rounds), *start]
