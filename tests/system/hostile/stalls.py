"""Collects all kinds of requests, and measures for how long each kind blocks a worker."""

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

MAX_STALL_MS = 50.0
"""The maximum time in milliseconds for which a request may block a worker, as docs/en/security.md states it."""
TRIES = 10
"""How often a kind of request above the limit is sent. In some tries, a full garbage collection of Python or a pause of
the machine may delay a ping."""
SETTLE_SECONDS = 0.05
"""Seconds for which the pings continue after the last response, because the worker may still work then."""


MODULES = (attacks_manifests, attacks_names, attacks_http, attacks_lists, attacks_uploads, attacks_upstreams)


def all_attacks() -> Mapping[str, Attack]:
    """Returns all kinds of requests by name. Raises ValueError if two have the same name."""
    attacks: dict[str, Attack] = {}
    for kind in (kind for module in MODULES for kind in module.ATTACKS):
        if kind.name in attacks:
            raise ValueError(f"two kinds are called {kind.name}")
        attacks[kind.name] = kind
    return attacks


@dataclass(frozen=True)
class StallResult:
    """The result for one kind. `stall`: of up to `TRIES` tries, the one with the smallest delay; for each try, the
    slowest ping of all workers. `attempt`: the number of this try. `status`: of its last response."""

    kind: Attack
    stall: Stall
    status: int
    attempt: int

    @property
    def blocked_ms(self) -> float:
        """The time in milliseconds for which the worker was blocked."""
        return self.stall.blocked_ms

    def __str__(self) -> str:
        return (
            f"{self.kind.name}: {self.blocked_ms:.1f} ms (answered {self.status}, try {self.attempt}; the ping took "
            f"{self.stall.elapsed_ms:.1f} ms, in which the loop ran {self.stall.main_cpu_ms:.1f} ms and another thread "
            f"{self.stall.other_cpu_ms:.1f} ms)"
        )


def measure(site: AttackedSite, watcher: PingWatcher, kind: Attack, tries: int = TRIES) -> StallResult:
    """Sends this kind of request up to `tries` times, until no worker is blocked for longer than the limit."""
    best: StallResult | None = None
    for number in range(1, tries + 1):
        watcher.begin()
        status = kind.attack(site).status
        threading.Event().wait(SETTLE_SECONDS)
        stall = max(watcher.end(), key=lambda each: each.blocked_ms)
        if best is None or stall.blocked_ms < best.blocked_ms:
            best = StallResult(kind, stall, status, number)
        if best.blocked_ms <= MAX_STALL_MS:
            break
    assert best is not None
    return best


def table(results: Mapping[str, StallResult]) -> str:
    """Returns a table of the results, with the largest delay first."""
    lines = [f"{'kind':52} {'limit':>12} {'status':>6} {'held ms':>8} {'loop ms':>8} {'thread ms':>9}"]
    lines += [
        f"{result.kind.name:52} {result.kind.limit:>12} {result.status:>6} {result.blocked_ms:8.1f} "
        f"{result.stall.main_cpu_ms:8.1f} {result.stall.other_cpu_ms:9.1f}"
        for result in sorted(results.values(), key=lambda result: -result.blocked_ms)
    ]
    return "\n".join(lines)


def summary(results: Mapping[str, StallResult]) -> str:
    """Returns the table of the largest delay in each group of kinds, in the format of docs/en/security.md."""
    groups: dict[str, list[StallResult]] = {}
    for name, result in results.items():
        groups.setdefault(name.partition(":")[0], []).append(result)
    lines = ["| Group | Kinds | Worst, ms | Which |", "|---|---|---|---|"]
    for group, group_results in groups.items():
        worst = max(group_results, key=lambda each: each.blocked_ms)
        lines.append(
            f"| {group} | {len(group_results)} | {worst.blocked_ms:.0f} | {worst.kind.name.partition(': ')[2]} |"
        )
    return "\n".join(lines)
