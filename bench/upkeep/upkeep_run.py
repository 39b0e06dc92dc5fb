"""The bench `upkeep`: builds stores of several sizes, runs a server for each, and measures garbage collection and cache
eviction on one server after the other."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.random_content import make_config, small_layers
from bench.report.goals import upkeep_goals
from bench.report.measurements import CPU_SECONDS, P99, RowSamples
from bench.runner import Bench, Options, Rounds, pick_rows
from bench.sized_stores import SizePlan, build_data, served, size_bench
from bench.system.servers import ENTREPOT, HOST, ServerProgram
from bench.upkeep.upkeep_rows import FilledStore, UpkeepTrial, prepare_store, upkeep_rows
from bench.upkeep.upkeep_store import UPSTREAM, StoreSize, UpkeepStore

DISK_BYTES_PER_BLOB = 10_000
"""A generous estimate of the disk space for the file and its inode, for rows and indexes, and for the WAL while the
rows are inserted."""
DRAWN = (P99, CPU_SECONDS)
"""The figures of the plot that compares two versions of Entrepot."""
CONFIG = f"""
[[upstream]]
name = "{UPSTREAM}"
endpoints = ["http://{HOST}:9"]
"""
"""The configuration of the measured servers. Clients request only cached content, so no server listens on the
endpoint."""


def upkeep_bench(options: Options) -> Bench:
    """Returns the bench, ready to run. Raises BenchFailed if the options name an unknown row, or a folder that is not a
    checkout of Entrepot."""
    pick_rows(upkeep_rows(), options.only)  # raises BenchFailed before any store is built
    measure = partial(_measure, options=options)
    plan = SizePlan("upkeep", "blobs", DISK_BYTES_PER_BLOB, _build, measure, upkeep_goals, DRAWN, is_largest_first=True)
    return size_bench(options, plan)


def _build(parent: Path, program: ServerProgram, count: int) -> FilledStore:
    """Builds a store: pushes an image, whose config all other images share, to a server of the program. Then inserts
    all other content."""
    name = f"{count:,} blobs" if program is ENTREPOT else f"{count:,} blobs, {program.name}"
    mirror, folder = replace(program, command=_mirror_command), parent / name
    layers = small_layers(1)
    config = make_config(layers)
    content = UpkeepStore(folder / "data", StoreSize(count), config)
    cost = build_data(name, mirror, folder, (config, layers), lambda _: content.fill())
    return FilledStore(name, mirror, folder, content, config, *cost)  # `cost`: disk_bytes and build_seconds


def _mirror_command(folder: Path, port: int, _: str | None) -> list[str]:
    """Returns the command for an Entrepot with two workers and default settings that mirrors an upstream. Every
    version of Entrepot gets this command. `started_server` sets PYTHONPATH to the checkout of the program, so
    `-m registry` runs the code of that version."""
    path = folder / "config.toml"
    path.write_text(CONFIG)
    command = [sys.executable, "-m", "registry", "serve", "--workers", "2", "--listen", f"{HOST}:{port}"]
    return [*command, "--data", str(folder / "data"), "--config", str(path)]


def _measure(stores: Sequence[FilledStore], options: Options) -> list[RowSamples]:
    with served(stores, prepare_store) as servers:

        @contextlib.contextmanager
        def open_trial(store: FilledStore, _: int) -> Iterator[UpkeepTrial]:
            yield UpkeepTrial(store, servers[store.name], options.seconds)

        return Rounds(pick_rows(upkeep_rows(), options.only), stores, open_trial).run(options.rounds)
