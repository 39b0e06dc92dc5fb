"""`ActivityCounts`: which of the counts in shared memory are the activity of the server, and how much of that is in the
store already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, fields
from typing import Final

from registry.telemetry.metric_families import CellPlan, Counter
from registry.telemetry.mirror_metrics import MirrorMetrics
from registry.telemetry.shared_cells import SharedCells
from storage.activity import Activity

_PULLED: Final = ("200", "304")
_PUSHED: Final = ("201",)
_ROUTES: Final = ("manifests", "blobs")
_HITS: Final = ("hit", "stale", "revalidated")
_SIZE: Final = len(fields(Activity))


class ActivityCounts:
    """The activity that all processes of one server have counted together.

    Cells in the same memory say how much of it was stored. So another process can take this work over, also after a
    death or a restart that goes on with the counts."""

    def __init__(self, plan: CellPlan, requests: Counter, mirror: MirrorMetrics) -> None:
        """`requests`: the complete responses by route, method and status. Call `use` before anything is read."""
        self._cells: SharedCells
        self._totals: Callable[[], Sequence[float]]
        self._requests = requests
        self._mirror = mirror
        self._first_stored = plan.reserve(_SIZE)

    def use(self, cells: SharedCells, totals: Callable[[], Sequence[float]]) -> None:
        """Makes the methods read and write `cells`, which have the cells of the plan. `totals` returns their totals."""
        self._cells = cells
        self._totals = totals

    @property
    def is_shared(self) -> bool:
        """Whether this process counts in the memory that all processes share. It does not if too many processes run;
        then it cannot say what it has stored."""
        return self._cells.own_column is not None

    def unstored(self) -> Activity:
        """Returns the activity since the server's start that is not stored yet. Takes some milliseconds."""
        totals = self._totals()
        stored = totals[self._first_stored : self._first_stored + _SIZE]
        return Activity(*(max(0, int(now - before)) for now, before in zip(self._counted(totals), stored, strict=True)))

    def on_stored(self, activity: Activity) -> None:
        """Remembers that the activity is in the store now. If the process is killed before it can do so, this activity
        is stored twice, which for a chart is no harm."""
        for position, number in enumerate(astuple(activity)):
            self._cells.own[self._first_stored + position] += number

    def _counted(self, totals: Sequence[float]) -> Iterator[float]:
        """Yields the numbers of an `Activity`, in its order."""
        requests, mirror = self._requests, self._mirror
        yield sum(
            totals[requests.cell("manifests", method, status)] for method in ("GET", "HEAD") for status in _PULLED
        )
        yield sum(totals[requests.cell("manifests", "PUT", status)] for status in _PUSHED)
        found = dict.fromkeys(("hits", "misses"), 0.0)
        for (_, route, cache), numbers in mirror.requests.counted(totals):
            if route in _ROUTES:
                found["hits"] += numbers[0] if cache in _HITS else 0
                found["misses"] += numbers[0] if cache == "miss" else 0
        yield from found.values()
        yield sum(numbers[0] for _, numbers in mirror.fetched_bytes.counted(totals))
        yield sum(
            numbers[0]
            for (_, route, cache), numbers in mirror.served_bytes.counted(totals)
            if route in _ROUTES and cache in _HITS
        )
