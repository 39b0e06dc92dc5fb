"""What is to be reached, as figures: issue by issue the promises that `make bench` checks; the mirror's are its own.

What the mirror is to reach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.report.measurements import CPU, CPU_GIB, CPU_SECONDS, P99, RowSamples
from bench.system.servers import DOCKER_REGISTRY, ENTREPOT


@dataclass(frozen=True)
class Goal:
    """A bound on one figure: on Entrepot's median itself, or on its ratio to the other server's."""

    row: str
    key: str
    text: str
    """What the figure is, for people."""
    limit: float
    at_least: bool
    relative: bool
    peer: str = DOCKER_REGISTRY.name
    """The server a ratio is taken against."""

    @property
    def wanted(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{sign} {self.limit:g}{'x' if self.relative else ''}"

    def measured(self, line: RowSamples) -> float | None:
        """None: it was not measured."""
        if self.relative:
            return line.ratio(ENTREPOT.name, self.peer, self.key)
        return line.median(ENTREPOT.name, self.key)

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def at_least_times(row: str, key: str, text: str, limit: float) -> Goal:
    """At least that many times docker-registry's."""
    return Goal(row, key, text, limit, at_least=True, relative=True)


def at_most_share(row: str, key: str, text: str, limit: float) -> Goal:
    """At most that part of docker-registry's."""
    return Goal(row, key, text, limit, at_least=False, relative=True)


def at_most(row: str, key: str, text: str, limit: float) -> Goal:
    """At most that much."""
    return Goal(row, key, text, limit, at_least=False, relative=False)


COST_FIGURES = (CPU, CPU_GIB, CPU_SECONDS, P99)
"""The figures of a row that a change must not raise."""
ALLOWED_COST_RATIO = 1.1
"""How many times the cost before a change its cost may be."""


def no_slower_goals(lines: Sequence[RowSamples], peer: str) -> tuple[Goal, ...]:
    """The goals of a comparison with an older Entrepot, called `peer`: no row costs more than it did."""
    return tuple(
        Goal(
            line.name,
            figure.key,
            f"{line.title}, {figure.unit}",
            ALLOWED_COST_RATIO,
            at_least=False,
            relative=True,
            peer=peer,
        )
        for line in lines
        for figure in line.figures
        if figure in COST_FIGURES
    )


PEAK_MEMORY_ROW = "memory-peak"
REGISTRY_GOALS = (
    at_least_times("manifest-tag", "rate", "manifest by tag, requests/s", 9.5),
    at_most_share("manifest-tag", "cpu", "manifest by tag, CPU each", 1 / 8),
    at_least_times("manifest-digest", "rate", "manifest by digest, requests/s", 9.5),
    at_most_share("manifest-digest", "cpu", "manifest by digest, CPU each", 1 / 8),
    at_most("manifest-tag-bearer", "toll", "manifest by tag with a token, CPU to that without", 1.15),
    at_least_times("blob-4k", "rate", "blob of 4 KiB, requests/s", 22),
    at_least_times("v2", "rate", "GET /v2/, requests/s", 10),
    at_least_times("tags-list", "rate", "tags list, requests/s", 8),
    at_least_times("tag-put", "rate", "tag PUT, per s", 3.4),
    at_least_times("blob-256m", "speed", "blob of 256 MiB, MiB/s", 1),
    at_most_share("blob-256m", "cpu_gib", "blob of 256 MiB, CPU", 0.6),
    at_least_times("blob-256m-x4", "speed", "4 at once, MiB/s", 1),
    at_most_share("blob-256m-x4", "cpu_gib", "4 at once, CPU", 0.5),
    at_least_times("push-256m", "speed", "push of 256 MiB, MiB/s", 2.8),
    at_most_share("push-256m", "cpu_gib", "push of 256 MiB, CPU", 0.4),
    at_most("start", "pss", "memory idle, MiB", 160),
    at_most(PEAK_MEMORY_ROW, "pss", "memory at its peak, MiB", 220),
    at_most("start", "seconds", "ready to serve, s", 2),
    at_most("manifest-under-bulk", "p99", "manifest p99 beside bulk, ms", 50),
    at_most("login-storm", "p99", "GET /v2/ p99 beside 10,000 wrong logins, ms", 100),
)

GoalResult = tuple[Goal, float | None]


def judge_goals(lines: Mapping[str, RowSamples], goals: tuple[Goal, ...] = REGISTRY_GOALS) -> list[GoalResult]:
    """Each goal whose row was asked for, with what was measured; None where that failed."""
    return [(goal, goal.measured(lines[goal.row])) for goal in goals if goal.row in lines]


def are_all_met(verdicts: Sequence[GoalResult]) -> bool:
    """Whether every goal is; one without a measurement is not."""
    return all(value is not None and goal.met(value) for goal, value in verdicts)


MIRROR_GOALS = (
    at_most("thundering", "sent", "32 clients: upstream sent, x image", 1),
    at_most("thundering", "gets", "32 clients: manifest GETs upstream", 1),
    at_most_share("slow-link", "seconds", "cold pull, 8 MiB/s a request, s", 1 / 5),
    at_most_share("paced-link", "seconds", "cold pull, 8 MiB/s a connection, s", 1 / 5),
    at_most_share("fast-link", "seconds", "cold pull, unthrottled, s", 1),
    at_most_share("warm", "seconds", "warm pull, s", 1),
    at_most("first-byte", "first", "first byte of a cold blob, ms beyond upstream's", 20),
    at_most("fill", "headers", "headers of a cold 1 GiB blob, ms beyond upstream's", 20),
    at_most("hosted-beside-fill", "p99", "hosted manifest p99 beside a fill, ms", 50),
    at_most("cached-beside-fill", "p99", "mirrored manifest p99 beside a fill, ms", 50),
    at_most("fill-memory", "growth", "memory growth, 2 GiB with 16 readers, MiB", 32),
)
