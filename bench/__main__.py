"""`python -m bench registries`, `python -m bench mirror` and `python -m bench growth`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bench import growth, mirror
from bench.errors import BenchFailed, TrialFailed
from bench.mirror.mirror_servers import DOCKER_REGISTRY_AS_MIRROR, mirror_checkout
from bench.registries import registry_run
from bench.system.servers import DOCKER_REGISTRY, entrepot_checkout


def main(arguments: Sequence[str] | None = None) -> int:
    """0: measured; 1: something failed, or with `--strict` a goal is not met; 2: bad arguments."""
    signal.signal(signal.SIGTERM, _interrupt)
    options = _parser().parse_args(arguments)
    try:
        good = RUNS[options.what](options)
    except (BenchFailed, TrialFailed) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0 if good else 1


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM unwinds as Ctrl-C does, so that what was started is ended."""
    raise KeyboardInterrupt


def _registries(options: argparse.Namespace) -> bool:
    rounds, seconds = (1, 1.0) if options.quick else (7, 4.0)
    plan = registry_run.RegistryPlan(
        options.rounds or rounds,
        options.seconds or seconds,
        registry_run.chosen_rows(options.only),
        entrepot_checkout(options.against) if options.against else DOCKER_REGISTRY,
        options.folder,
        options.json,
        options.plot,
    )
    outcome = registry_run.compare_registries(plan)
    return outcome.is_complete and (outcome.met or not options.strict)


def _mirror(options: argparse.Namespace) -> bool:
    plan = mirror.MirrorPlan(
        options.rounds or (1 if options.quick else 5),
        mirror.chosen_mirror_rows(options.only),
        mirror_checkout(options.against) if options.against else DOCKER_REGISTRY_AS_MIRROR,
        options.quick,
        options.folder,
        options.json,
        options.plot,
    )
    outcome = mirror.compare_mirrors(plan)
    return outcome.is_complete and (outcome.met or not options.strict)


def _growth(options: argparse.Namespace) -> bool:
    rounds, seconds, sizes = (1, 1.0, [100, 10_000]) if options.quick else (3, 4.0, [100, 10_000, 1_000_000])
    plan = growth.GrowthPlan(
        options.rounds or rounds,
        options.seconds or seconds,
        options.sizes or sizes,
        options.folder,
        options.json,
        options.plot,
    )
    return growth.measure_growth(plan) or not options.strict


RUNS = {"registries": _registries, "mirror": _mirror, "growth": _growth}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures Entrepot.")
    what = parser.add_subparsers(dest="what", required=True)
    beside = what.add_parser("registries", help="beside Debian's docker-registry")
    mirrors = what.add_parser("mirror", help="as a mirror, beside docker-registry in proxy mode")
    grows = what.add_parser("growth", help="as the store grows")
    grows.add_argument("--sizes", type=_sizes, metavar="N,…", help="manifests in each store, ascending")
    for each in (beside, mirrors):
        each.add_argument("--against", type=Path, metavar="FOLDER", help="beside the Entrepot of that checkout instead")
        each.add_argument("--only", metavar="ROW,…", help="just these rows")
    for each in (beside, grows):
        each.add_argument("--seconds", type=_duration, metavar="S", help="length of a trial, about")
    for each in (beside, mirrors, grows):
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
