"""All kinds of requests, and how long one of them holds a worker."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from tests.system.hostile import (
    attacks_http,
    attacks_lists,
    attacks_manifests,
    attacks_names,
    attacks_uploads,
    attacks_upstreams,
)
from tests.system.hostile.attack import Attack
from tests.system.hostile.attacked_site import AttackedSite
from tests.system.hostile.ping_watcher import PingWatcher, Stall

BOUND = 50.0
"""Milliseconds: what docs/en/security.md promises."""
TRIES = 3
SETTLE_SECONDS = 0.1
"""Seconds that are watched after the last answer: not all work is over with it."""


MODULES = (attacks_manifests, attacks_names, attacks_http, attacks_lists, attacks_uploads, attacks_upstreams)


def all_attacks() -> Mapping[str, Attack]:
    """By name. Raises ValueError when two have the same."""
    found: dict[str, Attack] = {}
    for kind in (kind for module in MODULES for kind in module.ATTACKS):
        if kind.name in found:
            raise ValueError(f"two kinds are called {kind.name}")
        found[kind.name] = kind
    return found


@dataclass(frozen=True)
class StallResult:
    """The least of the worst figures of up to three tries, and the last answer's status."""

    kind: Attack
    stall: Stall
    status: int
    attempt: int

    @property
    def held(self) -> float:
        return self.stall.held

    def __str__(self) -> str:
        return (
            f"{self.kind.name}: {self.held:.1f} ms (answered {self.status}, try {self.attempt}; the ping took "
            f"{self.stall.took:.1f} ms, in which the loop ran {self.stall.ran:.1f} ms and another thread "
            f"{self.stall.other:.1f} ms)"
        )


def measure(site: AttackedSite, watcher: PingWatcher, kind: Attack, tries: int = TRIES) -> StallResult:
    """Runs it until it keeps within the bound, at the most that many times."""
    best: StallResult | None = None
    for number in range(1, tries + 1):
        watcher.begin()
        status = kind.attack(site).status
        threading.Event().wait(SETTLE_SECONDS)
        stall = max(watcher.end(), key=lambda each: each.held)
        if best is None or stall.held < best.held:
            best = StallResult(kind, stall, status, number)
        if best.held <= BOUND:
            break
    assert best is not None
    return best


def table(results: Mapping[str, StallResult]) -> str:
    """For a person, the worst first."""
    lines = [f"{'kind':52} {'limit':>12} {'status':>6} {'held ms':>8} {'loop ms':>8} {'thread ms':>9}"]
    lines += [
        f"{each.kind.name:52} {each.kind.limit:>12} {each.status:>6} {each.held:8.1f} {each.stall.ran:8.1f} "
        f"{each.stall.other:9.1f}"
        for each in sorted(results.values(), key=lambda each: -each.held)
    ]
    return "\n".join(lines)


def summary(results: Mapping[str, StallResult]) -> str:
    """The worst of each group of kinds, as docs/en/security.md has it."""
    groups: dict[str, list[StallResult]] = {}
    for name, result in results.items():
        groups.setdefault(name.partition(":")[0], []).append(result)
    lines = ["| Group | Kinds | Worst, ms | Which |", "|---|---|---|---|"]
    for group, found in groups.items():
        worst = max(found, key=lambda each: each.held)
        lines.append(f"| {group} | {len(found)} | {worst.held:.0f} | {worst.kind.name.partition(': ')[2]} |")
    return "\n".join(lines)
