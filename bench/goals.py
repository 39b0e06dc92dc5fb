"""What is to be reached, as figures: issue by issue the promises that `make bench` checks; the mirror's are its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.figures import CPU, CPU_GIB, CPU_SECONDS, P99
from bench.results import Line
from bench.servers import ENTREPOT, RIVAL


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
    peer: str = RIVAL.name
    """The server a ratio is taken against."""

    @property
    def wanted(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{sign} {self.limit:g}{'x' if self.relative else ''}"

    def measured(self, line: Line) -> float | None:
        """None: it was not measured."""
        if self.relative:
            return line.ratio(ENTREPOT.name, self.peer, self.key)
        return line.median(ENTREPOT.name, self.key)

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def times(row: str, key: str, text: str, limit: float) -> Goal:
    """At least that many times docker-registry's."""
    return Goal(row, key, text, limit, at_least=True, relative=True)


def share(row: str, key: str, text: str, limit: float) -> Goal:
    """At most that part of docker-registry's."""
    return Goal(row, key, text, limit, at_least=False, relative=True)


def most(row: str, key: str, text: str, limit: float) -> Goal:
    """At most that much."""
    return Goal(row, key, text, limit, at_least=False, relative=False)


COSTS = (CPU, CPU_GIB, CPU_SECONDS, P99)
"""The figures of a row that a change must not raise."""
ALLOWED = 1.1
"""How many times the cost before a change its cost may be."""


def no_slower(lines: Sequence[Line], peer: str) -> tuple[Goal, ...]:
    """The goals of a comparison with an older Entrepot, called `peer`: no row costs more than it did."""
    return tuple(
        Goal(line.name, figure.key, f"{line.title}, {figure.unit}", ALLOWED, at_least=False, relative=True, peer=peer)
        for line in lines
        for figure in line.figures
        if figure in COSTS
    )


PEAK = "memory-peak"
GOALS = (
    times("manifest-tag", "rate", "manifest by tag, requests/s", 9.5),
    share("manifest-tag", "cpu", "manifest by tag, CPU each", 1 / 8),
    times("manifest-digest", "rate", "manifest by digest, requests/s", 9.5),
    share("manifest-digest", "cpu", "manifest by digest, CPU each", 1 / 8),
    most("manifest-tag-bearer", "toll", "manifest by tag with a token, CPU to that without", 1.15),
    times("blob-4k", "rate", "blob of 4 KiB, requests/s", 22),
    times("v2", "rate", "GET /v2/, requests/s", 10),
    times("tags-list", "rate", "tags list, requests/s", 8),
    times("tag-put", "rate", "tag PUT, per s", 3.4),
    times("blob-256m", "speed", "blob of 256 MiB, MiB/s", 1),
    share("blob-256m", "cpu_gib", "blob of 256 MiB, CPU", 0.6),
    times("blob-256m-x4", "speed", "4 at once, MiB/s", 1),
    share("blob-256m-x4", "cpu_gib", "4 at once, CPU", 0.5),
    times("push-256m", "speed", "push of 256 MiB, MiB/s", 2.8),
    share("push-256m", "cpu_gib", "push of 256 MiB, CPU", 0.4),
    most("start", "pss", "memory idle, MiB", 160),
    most(PEAK, "pss", "memory at its peak, MiB", 220),
    most("start", "seconds", "ready to serve, s", 2),
    most("manifest-under-bulk", "p99", "manifest p99 beside bulk, ms", 50),
    most("login-storm", "p99", "GET /v2/ p99 beside 10,000 wrong logins, ms", 100),
)

Verdict = tuple[Goal, float | None]


def judge(lines: Mapping[str, Line], goals: tuple[Goal, ...] = GOALS) -> list[Verdict]:
    """Each goal whose row was asked for, with what was measured; None where that failed."""
    return [(goal, goal.measured(lines[goal.row])) for goal in goals if goal.row in lines]


def all_met(verdicts: Sequence[Verdict]) -> bool:
    """Whether every goal is; one without a measurement is not."""
    return all(value is not None and goal.met(value) for goal, value in verdicts)
