"""`ActivityCounts`: computes the server's activity (numbers of pulls, pushes, cache hits and so on) from the counters
in shared memory, and remembers how much of the activity is already stored in the database (`storage.activity`). A
*cell* is one number in the shared memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, fields
from typing import Final

from registry.telemetry.metric_families import CellPlan, Counter
from registry.telemetry.mirror_metrics import MirrorMetrics
from registry.telemetry.shared_cells import SharedCells
from storage.activity import Activity

_PULL_STATUSES: Final = ("200", "304")
"""A response with one of these statuses to a GET or HEAD request for a manifest counts as a pull."""
_PUSH_STATUSES: Final = ("201",)
"""A response with this status to a PUT request for a manifest counts as a push."""
_CACHE_ROUTES: Final = ("manifests", "blobs")
"""Routes whose requests count as cache hits or misses."""
_HIT_STATES: Final = ("hit", "stale", "revalidated")
"""Cache states that count as a hit."""
_FIELD_COUNT: Final = len(fields(Activity))
"""Number of values in an `Activity`."""


class ActivityCounts:
    """The activity of all processes of one server together.

    The shared memory also records how much of the activity is stored. If the process that stores the activity dies,
    another process continues from this record. The counters are in the same memory, so a restart of the server keeps
    either both the counters and the record, or neither."""

    def __init__(self, plan: CellPlan, requests: Counter, mirror: MirrorMetrics) -> None:
        """Call `attach_memory` before any other method. `plan`: assigns the cells of the shared memory. The constructor
        reserves cells for the record of the stored activity. `requests`: counts the complete responses by route, method
        and status. `mirror`: counts the requests and bytes of mirrored content."""
        self._cells: SharedCells
        self._totals: Callable[[], Sequence[float]]
        self._requests = requests
        self._mirror = mirror
        self._stored_position = plan.reserve(_FIELD_COUNT)
        """Position of the first of the cells that record the stored activity, one for each field of `Activity`."""

    def attach_memory(self, cells: SharedCells, totals: Callable[[], Sequence[float]]) -> None:
        """Sets the shared memory to use: `cells`, laid out by the plan. `totals`: returns, for each cell of the plan,
        the sum over all processes."""
        self._cells = cells
        self._totals = totals

    @property
    def has_own_column(self) -> bool:
        """Whether this process has a *column* in the shared memory: cells to which only this process writes. The number
        of columns is limited. A process without a column cannot record that activity is stored."""
        return self._cells.own_column_number is not None

    def compute_unstored(self) -> Activity:
        """Returns the activity since the server's start that is not stored yet. Blocks for some milliseconds."""
        totals = self._totals()
        stored = totals[self._stored_position : self._stored_position + _FIELD_COUNT]
        return Activity(
            *(max(0, int(now - before)) for now, before in zip(self._field_totals(totals), stored, strict=True))
        )

    def record_stored(self, activity: Activity) -> None:
        """Records that `activity` is stored. Call this directly after storing it: if the process is killed between the
        two steps, another process stores the activity again. This does little harm: only charts show the activity."""
        for position, number in enumerate(astuple(activity)):
            self._cells.own[self._stored_position + position] += number

    def _field_totals(self, totals: Sequence[float]) -> Iterator[float]:
        """Yields the activity since the server's start: the values of the fields of `Activity`, in order."""
        requests, mirror = self._requests, self._mirror
        yield sum(
            totals[requests.cell("manifests", method, status)]
            for method in ("GET", "HEAD")
            for status in _PULL_STATUSES
        )
        yield sum(totals[requests.cell("manifests", "PUT", status)] for status in _PUSH_STATUSES)
        lookups = dict.fromkeys(("hits", "misses"), 0.0)
        # `numbers` is a sequence, because a series of a histogram has several numbers. The metrics here are counters. A
        # series of a counter has only the number `numbers[0]`.
        for (_, route, cache), numbers in mirror.requests.nonzero_series(totals):
            if route in _CACHE_ROUTES:
                lookups["hits"] += numbers[0] if cache in _HIT_STATES else 0
                lookups["misses"] += numbers[0] if cache == "miss" else 0
        yield from lookups.values()
        yield sum(numbers[0] for _, numbers in mirror.fetched_bytes.nonzero_series(totals))
        yield sum(
            numbers[0]
            for (_, route, cache), numbers in mirror.served_bytes.nonzero_series(totals)
            if route in _CACHE_ROUTES and cache in _HIT_STATES
        )
