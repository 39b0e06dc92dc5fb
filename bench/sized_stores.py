"""Stores of growing size, which are served side by side: how the figures change with the size or, with another
checkout, how the programs differ at each size."""

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
BASE_REPO = "base/app"
BASE_DISK_BYTES = 1 << 30


class SizedStore(Protocol):
    """A store of one program. `count`: how many manifests or blobs it has."""

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
    """What a bench does with its stores."""

    name: str
    """The name of the bench and of its files."""
    unit: str
    """What the size of a store counts, such as `blobs`."""
    disk_bytes_per_unit: int
    build: Callable[[Path, ServerProgram, int], StoreT]
    """Builds a store of this size in a subfolder."""
    measure: Callable[[Sequence[StoreT]], list[RowSamples]]
    goals: Callable[[str, str], Sequence[Goal]]
    """Returns the goals for the smallest and the largest store, by their names."""
    drawn: Collection[Figure]
    """The figures of the plot beside another checkout."""
    is_largest_first: bool = False
    """The order of the stores in the table."""
    table: Callable[[Sequence[RowSamples], Sequence[str]], str] = figures_table


def size_bench(options: Options, plan: SizePlan[StoreT]) -> Bench:
    """Returns the bench. With another checkout, each program has stores of all sizes, and each row is compared at each
    size. Raises BenchFailed for a folder that is not a checkout."""
    disk_bytes = BASE_DISK_BYTES + plan.disk_bytes_per_unit * sum(options.sizes)
    if options.against:

        def measure(programs: Sequence[ServerProgram], folder: Path) -> list[RowSamples]:
            return _measure_by_size(options.sizes, plan, programs, folder)

        names = plan.name, f"{plan.name}-against"
        return comparison(options, names, PACKAGES, 2 * disk_bytes, (), measure, plan.drawn)

    def find(folder: Path) -> Findings:
        stores = [plan.build(folder, ENTREPOT, size) for size in options.sizes]
        lines, names = plan.measure(stores), [one.name for one in stores]
        about = {"stores": {one.name: {"bytes": one.disk_bytes, "built_in": one.build_seconds} for one in stores}}
        series = {line.title: [line.median(name, line.figures[0].key) or 0 for name in names] for line in lines}
        plot = curves("As the store grows, against the smallest", options.sizes, series)
        subjects = names[::-1] if plan.is_largest_first else names
        return Findings(lines, subjects, plan.goals(names[0], names[-1]), plot, about, plan.table)

    return Bench(plan.name, [ENTREPOT], PACKAGES, disk_bytes, find)


def _measure_by_size(
    sizes: Sequence[int], plan: SizePlan[StoreT], programs: Sequence[ServerProgram], folder: Path
) -> list[RowSamples]:
    """Measures stores of all programs. Returns a row for each row and size, with samples by program."""
    stores = [plan.build(folder, program, size) for size in sizes for program in programs]
    split = list[RowSamples]()
    for line in plan.measure(stores):
        for size in sizes:
            samples = {one.program.name: line.samples.get(one.name, []) for one in stores if one.count == size}
            title = f"{line.title}, {size:,} {plan.unit}"
            split.append(RowSamples(f"{line.name}-{size}", title, line.figures, samples, line.failure))
    return split


class BuildCost(NamedTuple):
    """What a store takes on the disk, and how long it took to build."""

    disk_bytes: int
    seconds: float


def build_data(
    title: str,
    program: ServerProgram,
    folder: Path,
    image: tuple[BlobContent, Sequence[BlobContent]],
    fill: Callable[[Path], object],
) -> BuildCost:
    """Builds a data directory in `folder`: pushes an image, which is a config and layers, to the program's server, and
    then calls `fill` with the directory. Prints the cost below the title."""
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
    """Serves all stores inside the block, and prepares each for its measurement. Yields the servers by the names of
    their stores."""
    with contextlib.ExitStack() as stack:
        servers: dict[str, RunningServer] = {}
        for store in stores:
            servers[store.name] = stack.enter_context(started_server(store.program, store.folder))
            prepare(store, servers[store.name])
        yield servers
