"""Builds stores of growing size, serves them side by side, and measures what upkeep takes there."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.loaders.http_client import HttpClient
from bench.random_content import MIB, make_config, push_content, small_layers
from bench.report.goals import upkeep_goals
from bench.report.measurements import CPU_SECONDS, P99, RowSamples
from bench.report.plot import curves
from bench.runner import Bench, Findings, Options, Rounds, comparison, pick_rows
from bench.system.servers import ENTREPOT, HOST, RunningServer, ServerProgram, started_server
from bench.upkeep.upkeep_rows import FilledStore, UpkeepTrial, prepare_store, upkeep_rows
from bench.upkeep.upkeep_store import UPSTREAM, BlobCount, UpkeepStore

PACKAGES = {"wrk": "wrk"}
BASE_REPO = "base/app"
BASE_DISK_BYTES = 1 << 30
DISK_BYTES_PER_BLOB = 10_000
"""A generous estimate: the file and its inode, rows and indexes, and the WAL while they are inserted."""
DRAWN = (P99, CPU_SECONDS)
CONFIG = f"""
[[upstream]]
name = "{UPSTREAM}"
endpoints = ["http://{HOST}:9"]
"""
"""Nobody asks for something that is not cached, so nothing has to listen there."""


def upkeep_bench(options: Options) -> Bench:
    """Returns the bench. With another checkout, each program has stores of all sizes, and each row is compared at each
    size. Raises BenchFailed for a folder that is not a checkout, and for an unknown row."""
    disk_bytes = BASE_DISK_BYTES + DISK_BYTES_PER_BLOB * sum(options.sizes)
    pick_rows(upkeep_rows(), options.only)
    if options.against:
        measure = partial(_measure_by_size, options)
        return comparison(options, ("upkeep", "upkeep-against"), PACKAGES, 2 * disk_bytes, (), measure, DRAWN)

    def find(folder: Path) -> Findings:
        stores = [_build(folder, ENTREPOT, BlobCount(size)) for size in options.sizes]
        lines, names = _measure(stores, options), [one.name for one in stores]
        about = {"stores": {one.name: {"bytes": one.disk_bytes, "built_in": one.build_seconds} for one in stores}}
        series = {line.title: [line.median(name, line.figures[0].key) or 0 for name in names] for line in lines}
        plot = curves("As the store grows, against the smallest", options.sizes, series)
        return Findings(lines, names[::-1], upkeep_goals(names[0], names[-1]), plot, about)

    return Bench("upkeep", [ENTREPOT], PACKAGES, disk_bytes, find)


def _measure_by_size(options: Options, programs: Sequence[ServerProgram], folder: Path) -> list[RowSamples]:
    """Measures stores of all programs. Returns a row for each figure and size, with samples by program."""
    stores = [_build(folder, program, BlobCount(size)) for size in options.sizes for program in programs]
    split = list[RowSamples]()
    for line in _measure(stores, options):
        for size in options.sizes:
            samples = {
                one.program.name: line.samples.get(one.name, []) for one in stores if one.content.size.blobs == size
            }
            title = f"{line.title}, {size:,} blobs"
            split.append(RowSamples(f"{line.name}-{size}", title, line.figures, samples, line.failure))
    return split


def _build(parent: Path, program: ServerProgram, size: BlobCount) -> FilledStore:
    """Builds a store: pushes its config to the program's server, then inserts the other content."""
    name = f"{size.blobs:,} blobs" if program is ENTREPOT else f"{size.blobs:,} blobs, {program.name}"
    mirror = replace(program, command=_mirror_command)
    layers = small_layers(1)
    config, folder = make_config(layers), parent / name
    begun = time.perf_counter()
    with started_server(mirror, folder) as server, HttpClient(server.port) as client:
        push_content(client, BASE_REPO, "latest", config, layers)
    content = UpkeepStore(folder / "data", size, config)
    content.fill()
    seconds = time.perf_counter() - begun
    disk = sum(path.stat().st_blocks * 512 for path in (folder / "data").rglob("*") if path.is_file())
    print(f"{name}: {disk / MIB:,.0f} MiB, made in {seconds:.0f} s", flush=True)
    return FilledStore(name, mirror, folder, content, config, disk, seconds)


def _mirror_command(folder: Path, port: int, _: str | None) -> list[str]:
    """Uses the defaults with two workers, and a mirrored upstream."""
    path = folder / "config.toml"
    path.write_text(CONFIG)
    command = [sys.executable, "-m", "registry", "serve", "--workers", "2", "--listen", f"{HOST}:{port}"]
    return [*command, "--data", str(folder / "data"), "--config", str(path)]


def _measure(stores: Sequence[FilledStore], options: Options) -> list[RowSamples]:
    with contextlib.ExitStack() as stack:
        servers: dict[str, RunningServer] = {}
        for store in stores:
            servers[store.name] = stack.enter_context(started_server(store.program, store.folder))
            prepare_store(store, servers[store.name])

        @contextlib.contextmanager
        def open_trial(store: FilledStore, _: int) -> Iterator[UpkeepTrial]:
            yield UpkeepTrial(store, servers[store.name], options.seconds)

        return Rounds(pick_rows(upkeep_rows(), options.only), stores, open_trial).run(options.rounds)
