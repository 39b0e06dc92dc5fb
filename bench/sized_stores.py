"""Benches on stores of several sizes. They measure how the figures change with the size of the store. With `--against`,
they compare two versions of Entrepot at each size."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

from bench.loaders.http_client import HttpClient
from bench.random_content import MIB, BlobContent, push_content
from bench.report.goals import Goal
from bench.report.measurements import Figure, RowSamples
from bench.report.plot import curves
from bench.report.tables import figures_table
from bench.runner import Bench, Findings, Options, comparison
from bench.system.servers import ENTREPOT, RunningServer, ServerProgram, started_server

PACKAGES = {"wrk": "wrk"}
"""The needed programs, and the Debian packages that have them."""
BASE_REPO = "base/app"
"""The only repository of a store that is pushed. The rows of the others are inserted into the database."""
BASE_DISK_BYTES = 1 << 30
"""The disk space that a bench needs besides the content of its stores."""


class SizedStore(Protocol):
    """The data directory of one registry program. `count`: the number of manifests or blobs in it."""

    @property
    def name(self) -> str: ...
    @property
    def program(self) -> ServerProgram: ...
    @property
    def folder(self) -> Path: ...
    @property
    def count(self) -> int: ...
    @property
    def disk_bytes(self) -> int: ...
    @property
    def build_seconds(self) -> float: ...


StoreT = TypeVar("StoreT", bound=SizedStore)


@dataclass(frozen=True)
class SizePlan(Generic[StoreT]):
    """The description of a bench: how to build its stores, and what to measure on them."""

    name: str
    """The name of the bench and of its files of results."""
    unit: str
    """The objects that the size of a store counts, such as `blobs`."""
    disk_bytes_per_unit: int
    build: Callable[[Path, ServerProgram, int], StoreT]
    """Builds a store of this size in a subfolder."""
    measure: Callable[[Sequence[StoreT]], list[RowSamples]]
    goals: Callable[[str, str], Sequence[Goal]]
    """Returns the goals for the smallest and the largest store, by their names."""
    drawn: Collection[Figure]
    """The figures of the plot that compares two versions of Entrepot."""
    is_largest_first: bool = False
    """Whether the table begins with the largest store."""
    table: Callable[[Sequence[RowSamples], Sequence[str]], str] = figures_table


def size_bench(options: Options, plan: SizePlan[StoreT]) -> Bench:
    """Returns the bench, ready to run. With `--against`, both versions of Entrepot get stores of all sizes, and each
    row is compared at each size. Raises BenchFailed if the folder of `--against` is not a checkout of Entrepot."""
    disk_bytes = BASE_DISK_BYTES + plan.disk_bytes_per_unit * sum(options.sizes)
    if options.against:

        def measure(programs: Sequence[ServerProgram], folder: Path) -> list[RowSamples]:
            return _measure_by_size(options.sizes, plan, programs, folder)

        names = plan.name, f"{plan.name}-against"
        # The empty tuple: no goals for docker-registry, which is not measured. `comparison` sets the goals for another
        # version of Entrepot.
        return comparison(options, names, PACKAGES, 2 * disk_bytes, (), measure, plan.drawn)

    def find(folder: Path) -> Findings:
        stores = [plan.build(folder, ENTREPOT, size) for size in options.sizes]
        measured_rows, names = plan.measure(stores), [store.name for store in stores]
        about = {
            "stores": {store.name: {"bytes": store.disk_bytes, "built_in": store.build_seconds} for store in stores}
        }
        series = {
            row_samples.title: [row_samples.median(name, row_samples.figures[0].key) or 0 for name in names]
            for row_samples in measured_rows
        }
        # `curves` divides each median by the first one of its series, which is that of the smallest store.
        plot = curves("Median, as a multiple of the median on the smallest store", options.sizes, series)
        subjects = names[::-1] if plan.is_largest_first else names
        return Findings(measured_rows, subjects, plan.goals(names[0], names[-1]), plot, about, plan.table)

    return Bench(plan.name, [ENTREPOT], PACKAGES, disk_bytes, find)


def _measure_by_size(
    sizes: Sequence[int], plan: SizePlan[StoreT], programs: Sequence[ServerProgram], folder: Path
) -> list[RowSamples]:
    """Builds and measures stores of all sizes for all programs. Splits each measured row into one row for each size,
    and returns these rows. In the `samples` of a returned row, the keys are the names of the programs, not those of the
    stores."""
    stores = [plan.build(folder, program, size) for size in sizes for program in programs]
    split_rows = list[RowSamples]()
    for row_samples in plan.measure(stores):
        for size in sizes:
            samples = {
                store.program.name: row_samples.samples.get(store.name, []) for store in stores if store.count == size
            }
            title = f"{row_samples.title}, {size:,} {plan.unit}"
            split_rows.append(
                RowSamples(f"{row_samples.name}-{size}", title, row_samples.figures, samples, row_samples.failure)
            )
    return split_rows


class BuildCost(NamedTuple):
    """The disk space of a store, and the time that it took to build."""

    disk_bytes: int
    seconds: float


def build_data(
    title: str,
    program: ServerProgram,
    folder: Path,
    image: tuple[BlobContent, Sequence[BlobContent]],
    fill: Callable[[Path], object],
) -> BuildCost:
    """Builds a data directory in `folder`: pushes `image`, a config and layers, to a server of the program, stops the
    server, and calls `fill` with the directory. Prints `title` and the cost."""
    config, layers = image
    begun = time.perf_counter()
    with started_server(program, folder) as server, HttpClient(server.port) as client:
        push_content(client, BASE_REPO, "latest", config, layers)
    fill(folder / "data")
    seconds = time.perf_counter() - begun
    disk = sum(path.stat().st_blocks * 512 for path in (folder / "data").rglob("*") if path.is_file())
    print(f"{title}: {disk / MIB:,.0f} MiB, made in {seconds:.0f} s", flush=True)
    return BuildCost(disk, seconds)


@contextlib.contextmanager
def served(
    stores: Sequence[StoreT], prepare: Callable[[StoreT, RunningServer], object]
) -> Iterator[Mapping[str, RunningServer]]:
    """Runs a server for each store until the block ends, and calls `prepare` with each store and its server. Yields the
    servers by the names of their stores."""
    with contextlib.ExitStack() as stack:
        servers: dict[str, RunningServer] = {}
        for store in stores:
            servers[store.name] = stack.enter_context(started_server(store.program, store.folder))
            prepare(store, servers[store.name])
        yield servers
