"""The goals of each bench. A goal is an upper or lower bound on a measured figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.report.measurements import CPU, CPU_GIB, CPU_SECONDS, P99, SECONDS, RowSamples
from bench.system.servers import DOCKER_REGISTRY, ENTREPOT


@dataclass(frozen=True)
class Goal:
    """A bound on the median of one figure of `subject`, or on the ratio of this median to the median of `peer`."""

    row: str
    key: str
    """The key of the figure."""
    text: str
    """The meaning of the figure, as the report prints it."""
    limit: float
    at_least: bool
    relative: bool
    """Whether the bound is on the ratio to `peer`."""
    peer: str = DOCKER_REGISTRY.name
    subject: str = ENTREPOT.name

    @property
    def wanted(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{sign} {self.limit:g}{'x' if self.relative else ''}"

    def measured(self, row_samples: RowSamples) -> float | None:
        """Returns the median or the ratio that the goal limits; None if it was not measured."""
        if self.relative:
            return row_samples.ratio(self.subject, self.peer, self.key)
        return row_samples.median(self.subject, self.key)

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def at_least_times(row: str, key: str, text: str, limit: float) -> Goal:
    """Returns the goal that Entrepot's figure is at least `limit` times the figure of docker-registry."""
    return Goal(row, key, text, limit, at_least=True, relative=True)


def at_most_times(row: str, key: str, text: str, limit: float) -> Goal:
    """Returns the goal that Entrepot's figure is at most `limit` times the figure of docker-registry."""
    return Goal(row, key, text, limit, at_least=False, relative=True)


def at_most(row: str, key: str, text: str, limit: float, subject: str = ENTREPOT.name) -> Goal:
    """Returns the goal that the figure of `subject` is at most `limit`."""
    return Goal(row, key, text, limit, at_least=False, relative=False, subject=subject)


PEAK_MEMORY_ROW = "memory-peak"
REGISTRY_GOALS = (
    at_least_times("manifest-tag", "rate", "manifest by tag, requests/s", 9.5),
    at_most_times("manifest-tag", "cpu", "manifest by tag, CPU each", 1 / 8),
    at_least_times("manifest-digest", "rate", "manifest by digest, requests/s", 9.5),
    at_most_times("manifest-digest", "cpu", "manifest by digest, CPU each", 1 / 8),
    at_most("manifest-tag-bearer", "token_cost", "manifest by tag with a token, CPU / CPU without accounts", 1.15),
    at_least_times("blob-4k", "rate", "blob of 4 KiB, requests/s", 22),
    at_least_times("v2", "rate", "GET /v2/, requests/s", 10),
    at_least_times("tags-list", "rate", "tags list, requests/s", 8),
    at_least_times("tag-put", "rate", "tag PUT, per s", 3.4),
    at_least_times("blob-256m", "speed", "blob of 256 MiB, MiB/s", 1),
    at_most_times("blob-256m", "cpu_gib", "blob of 256 MiB, CPU", 0.6),
    at_least_times("blob-256m-x4", "speed", "4 at once, MiB/s", 1),
    at_most_times("blob-256m-x4", "cpu_gib", "4 at once, CPU", 0.5),
    at_least_times("push-256m", "speed", "push of 256 MiB, MiB/s", 2.8),
    at_most_times("push-256m", "cpu_gib", "push of 256 MiB, CPU", 0.4),
    at_most("start", "pss", "memory idle, MiB", 160),
    at_most(PEAK_MEMORY_ROW, "pss", "memory at its peak, MiB", 220),
    at_most("start", "seconds", "ready to serve, s", 2),
    at_most("manifest-under-bulk", "p99", "manifest p99 beside bulk, ms", 50),
    at_most("login-storm", "p99", "GET /v2/ p99 beside 10,000 wrong logins, ms", 100),
)
MIRROR_GOALS = (
    at_most("thundering", "sent", "32 clients: upstream sent, x image", 1),
    at_most("thundering", "gets", "32 clients: manifest GETs upstream", 1),
    at_most_times("slow-link", "seconds", "cold pull, 8 MiB/s a request, s", 1 / 5),
    at_most_times("paced-link", "seconds", "cold pull, 8 MiB/s a connection, s", 1 / 5),
    at_most_times("fast-link", "seconds", "cold pull, unthrottled, s", 1),
    at_most_times("warm", "seconds", "warm pull, s", 1),
    at_most("first-byte", "first", "first byte of a cold blob, ms beyond upstream's", 20),
    at_most("fill", "headers", "headers of a cold 1 GiB blob, ms beyond upstream's", 20),
    at_most("hosted-beside-fill", "p99", "hosted manifest p99 beside a fill, ms", 50),
    at_most("cached-beside-fill", "p99", "mirrored manifest p99 beside a fill, ms", 50),
    at_most("fill-memory", "growth", "memory growth, 2 GiB with 16 readers, MiB", 32),
)
MAX_SLOWDOWN = 1.3
"""The largest allowed ratio of the request rate on the smallest store to the rate on the largest store."""


MAX_PAGE_GROWTH = 2
"""The largest allowed ratio of a web page's time on the largest store to its time on a store of usual size."""


def growth_goals(smallest: str, largest: str, usual: str | None = None) -> tuple[Goal, ...]:
    """Returns the goals of the bench `growth`. The arguments are names of stores. `usual`: the store of usual size with
    which the times of web pages are compared; None: the smallest store."""

    def at_most_slower(row: str, text: str) -> Goal:
        return Goal(row, row, f"{text}, slower by", MAX_SLOWDOWN, False, True, peer=largest, subject=smallest)

    def at_most_longer(row: str, text: str) -> Goal:
        return Goal(row, row, text, MAX_PAGE_GROWTH, False, True, peer=usual or smallest, subject=largest)

    return (
        at_most_slower("hundred", "the same hundred manifests"),
        at_most_slower("manifest", "manifests all over, beside tag PUTs"),
        at_most_slower("put", "tag PUT"),
        at_most("tags", "tags", "page of 100 tags, ms", 5, largest),
        at_most("catalog", "catalog", "page of 100 repositories, ms", 5, largest),
        at_most("search", "search", "first page of a search, ms", 100, largest),
        at_most("overview", "overview", "page Overview of an admin, ms", 100, largest),
        at_most_longer("overview", "page Overview of an admin, longer by"),
        at_most("overview_others", "overview_others", "page Overview of others, ms", 100, largest),
        at_most_longer("overview_others", "page Overview of others, longer by"),
        at_most("search_page", "search_page", "page Search, ms", 100, largest),
        at_most_longer("search_page", "page Search, longer by"),
        at_most("repository_page", "repository_page", "page Repositories, ms", 100, largest),
        at_most_longer("repository_page", "page Repositories, longer by"),
        at_most("manifest_beside_pages", P99.key, "manifest p99 beside 8 browsers that click, ms", 50, largest),
        at_most("start", "start", "ready to serve, s", 2, largest),
    )


MAX_UPKEEP_GROWTH = 1.5
"""The largest allowed ratio of the time that a job takes on the largest store to its time on the smallest store. The
job removes the same number of blobs or images in both."""


def upkeep_goals(smallest: str, largest: str) -> tuple[Goal, ...]:
    """Returns the goals of the bench `upkeep`. The arguments are names of stores."""

    def at_most_longer(row: str, text: str) -> Goal:
        return Goal(row, SECONDS.key, text, MAX_UPKEEP_GROWTH, False, True, peer=smallest, subject=largest)

    return (
        at_most_longer("collect", "collection, seconds to those in the smallest store"),
        at_most_longer("evict", "eviction, seconds to those in the smallest store"),
        at_most("manifest-beside-collect", P99.key, "manifest p99 during a collection, ms", 50, largest),
        at_most("manifest-beside-collect", "slowdown", "manifest p99 during a collection, to idle", 2, largest),
        at_most("manifest-beside-evict", P99.key, "manifest p99 during an eviction, ms", 50, largest),
        at_most("manifest-beside-evict", "slowdown", "manifest p99 during an eviction, to idle", 2, largest),
    )


COST_FIGURES = (CPU, CPU_GIB, CPU_SECONDS, P99)
"""The figures that a change must not raise."""
MAX_COST_RATIO = 1.1


def no_slower_goals(measured_rows: Sequence[RowSamples], peer: str) -> tuple[Goal, ...]:
    """Returns the goals of a comparison with an older Entrepot, whose name is `peer`: no cost of a row is more than
    MAX_COST_RATIO times the cost in the older version."""
    return tuple(
        Goal(row_samples.name, each.key, f"{row_samples.title}, {each.unit}", MAX_COST_RATIO, False, True, peer=peer)
        for row_samples in measured_rows
        for each in row_samples.figures
        if each in COST_FIGURES
    )


GoalResult = tuple[Goal, float | None]
"""A goal and the measured value; None if the measurement failed."""


def judge_goals(measured_rows: Mapping[str, RowSamples], goals: Sequence[Goal] = REGISTRY_GOALS) -> list[GoalResult]:
    """Returns the result of each goal whose row is in `measured_rows`, which has the measured rows by name."""
    return [(goal, goal.measured(measured_rows[goal.row])) for goal in goals if goal.row in measured_rows]


def are_all_met(results: Sequence[GoalResult]) -> bool:
    """Returns whether every goal is met. A goal without a measurement is not met."""
    return all(value is not None and goal.met(value) for goal, value in results)


def goals_document(results: Sequence[GoalResult]) -> list[dict[str, object]]:
    """Returns the results as a document for JSON."""
    return [
        {"goal": goal.text, "wanted": goal.wanted, "measured": value, "met": are_all_met([(goal, value)])}
        for goal, value in results
    ]
