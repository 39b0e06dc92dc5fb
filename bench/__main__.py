"""The command line of the benchmarks: `python -m bench registries`, `mirror`, `growth` or `upkeep`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from bench.errors import BenchFailed
from bench.growth.growth_run import growth_bench
from bench.mirror.mirror_run import mirror_bench
from bench.registries.registry_run import registry_bench
from bench.runner import Bench, Options, run_bench
from bench.upkeep.upkeep_run import upkeep_bench


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the bench that the command line names, and returns the exit status: 0 after a complete run, 1 after a
    failure, 130 after an interrupt. With `--strict`, it is 1 also when a goal is not met. Exits with 2 on bad
    arguments."""
    signal.signal(signal.SIGTERM, _interrupt)
    parsed = _parser().parse_args(arguments)
    bench: Callable[[Options], Bench] = parsed.bench
    options = Options(
        rounds=parsed.rounds or (1 if parsed.quick else parsed.usual_rounds),
        seconds=parsed.seconds or (1.0 if parsed.quick else 4.0),
        sizes=parsed.sizes or (parsed.quick_sizes if parsed.quick else parsed.usual_sizes),
        **{name: getattr(parsed, name) for name in ("quick", "strict", "against", "only", "folder", "json", "plot")},
    )
    try:
        return 0 if run_bench(bench(options), options) else 1
    except BenchFailed as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Handles SIGTERM as Python handles Ctrl-C: the exception leaves all blocks, which stop the started programs."""
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures Entrepot.")
    commands = parser.add_subparsers(required=True)
    registries = commands.add_parser("registries", help="beside Debian's docker-registry")
    registries.set_defaults(bench=registry_bench, usual_rounds=7, sizes=None, usual_sizes=[], quick_sizes=[])
    mirror = commands.add_parser("mirror", help="as a mirror, beside docker-registry in proxy mode")
    mirror.set_defaults(bench=mirror_bench, usual_rounds=5, sizes=None, usual_sizes=[], quick_sizes=[], seconds=None)
    growth = commands.add_parser("growth", help="as the store grows")
    growth.set_defaults(
        bench=growth_bench,
        usual_rounds=3,
        usual_sizes=[100, 10_000, 1_000_000],
        quick_sizes=[100, 10_000],
    )
    growth.add_argument("--sizes", type=_sizes, metavar="N,…", help="manifests in each store, ascending")
    upkeep = commands.add_parser("upkeep", help="garbage collection and eviction, as the store grows")
    upkeep.set_defaults(
        bench=upkeep_bench, usual_rounds=3, usual_sizes=[10_000, 1_000_000], quick_sizes=[1_000, 10_000]
    )
    upkeep.add_argument("--sizes", type=_sizes, metavar="N,…", help="blobs in each store, ascending")
    for each in (registries, mirror, growth, upkeep):
        each.add_argument("--only", metavar="ROW,…", help="just these rows")
    for each in (registries, growth, upkeep):
        each.add_argument("--seconds", type=_duration, metavar="S", help="length of a trial, about")
    for each in (registries, mirror, growth, upkeep):
        each.add_argument("--against", type=Path, metavar="FOLDER", help="beside the Entrepot of that checkout")
        each.add_argument("--rounds", type=_count, metavar="N", help="rounds")
        each.add_argument("--quick", action="store_true", help="one short round: to see that it works")
        each.add_argument("--strict", action="store_true", help="exit with 1 when a goal is not met")
        each.add_argument("--folder", type=Path, help="where the temporary folder is made")
        each.add_argument("--json", type=Path, metavar="PATH", help="write the figures there as well")
        each.add_argument("--plot", type=Path, metavar="PATH", help="write the plot there as well (SVG)")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _duration(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 60:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 60")
    return value


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if sizes != sorted(set(sizes)) or sizes[0] < 100:
        raise argparse.ArgumentTypeError("sizes ascend, from 100 on")
    return sizes


if __name__ == "__main__":
    sys.exit(main())
