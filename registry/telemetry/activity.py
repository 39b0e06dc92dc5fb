"""`ActivityCounts`: computes the activity of the server (such as pulls, pushes and cache hits) from the counts in
shared memory, and remembers which part of the activity is already stored in the database (`storage.activity`). A *cell*
is one number in the shared memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, fields
from typing import Final

from registry.telemetry.metric_families import CellPlan, Counter
from registry.telemetry.mirror_metrics import MirrorMetrics
from registry.telemetry.shared_cells import SharedCells
from storage.activity import Activity

_PULLED: Final = ("200", "304")
"""A response with one of these statuses to a GET or HEAD request for a manifest counts as a pull."""
_PUSHED: Final = ("201",)
"""A response with this status to a PUT request for a manifest counts as a push."""
_ROUTES: Final = ("manifests", "blobs")
"""Routes whose requests count as cache hits or misses."""
_HITS: Final = ("hit", "stale", "revalidated")
"""Cache states that count as a hit."""
_FIELD_COUNT: Final = len(fields(Activity))
"""Number of values in an `Activity`."""


class ActivityCounts:
    """The activity that all processes of one server have counted together.

    The shared memory also records which activity was stored. If the process that stores the activity dies, another
    process can therefore continue. A restart that keeps the counts keeps this record too."""

    def __init__(self, plan: CellPlan, requests: Counter, mirror: MirrorMetrics) -> None:
        """`plan`: reserves cells for the stored activity. `requests`: counts the complete responses by route, method
        and status. Call `attach_memory` before any other method."""
        self._cells: SharedCells
        self._totals: Callable[[], Sequence[float]]
        self._requests = requests
        self._mirror = mirror
        self._first_stored = plan.reserve(_FIELD_COUNT)
        """Position of the first cell for the stored activity. There is one cell for each field of `Activity`."""

    def attach_memory(self, cells: SharedCells, totals: Callable[[], Sequence[float]]) -> None:
        """Makes the methods use the memory `cells`, laid out by the `plan`. `totals` returns a number for
        each cell: the total over all processes."""
        self._cells = cells
        self._totals = totals

    @property
    def has_own_column(self) -> bool:
        """Whether this process has a *column* in the shared memory: cells of its own, to which only it writes. The
        number of columns is limited. A process without a column cannot record which activity it has stored."""
        return self._cells.own_column_number is not None

    def unstored(self) -> Activity:
        """Returns the activity since the server's start that is not stored yet. Takes some milliseconds."""
        totals = self._totals()
        stored = totals[self._first_stored : self._first_stored + _FIELD_COUNT]
        return Activity(
            *(max(0, int(now - before)) for now, before in zip(self._field_totals(totals), stored, strict=True))
        )

    def on_stored(self, activity: Activity) -> None:
        """Records that the activity is stored now. If the process is killed after it has stored the activity and before
        this call, the activity is stored twice. This does little harm, because only charts show the activity."""
        for position, number in enumerate(astuple(activity)):
            self._cells.own[self._first_stored + position] += number

    def _field_totals(self, totals: Sequence[float]) -> Iterator[float]:
        """Yields the activity since the server's start: one number for each field of `Activity`, in this order."""
        requests, mirror = self._requests, self._mirror
        yield sum(
            totals[requests.cell("manifests", method, status)] for method in ("GET", "HEAD") for status in _PULLED
        )
        yield sum(totals[requests.cell("manifests", "PUT", status)] for status in _PUSHED)
        # A series of a counter has one cell, `numbers[0]`.
        lookups = dict.fromkeys(("hits", "misses"), 0.0)
        for (_, route, cache), numbers in mirror.requests.nonzero_series(totals):
            if route in _ROUTES:
                lookups["hits"] += numbers[0] if cache in _HITS else 0
                lookups["misses"] += numbers[0] if cache == "miss" else 0
        yield from lookups.values()
        yield sum(numbers[0] for _, numbers in mirror.fetched_bytes.nonzero_series(totals))
        yield sum(
            numbers[0]
            for (_, route, cache), numbers in mirror.served_bytes.nonzero_series(totals)
            if route in _ROUTES and cache in _HITS
        )
