"""The record of requests to the fake Hub. For each request, it has the number of body bytes that were handed to the
socket."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from .switches import HubRequestKind

Interval = tuple[int, int]


@dataclass
class RecordedRequest:
    """A request and the progress of its response."""

    kind: HubRequestKind
    method: str
    path: str
    """The path with the query, as the client sent it."""
    headers: dict[str, str] = field(repr=False)
    """The headers, by name in lower case. Authorization is left out."""
    authorization: bool
    """Whether the request had an Authorization header."""
    begun: float
    """When the request arrived, by the monotonic clock, which is the same in all processes."""
    digest: str = ""
    """The digest of the requested blob, or of the manifest in the response."""
    status: int = 0
    start: int = 0
    stop: int = 0
    """According to its headers, the response has the bytes from `start` to `stop` of the blob or manifest."""
    sent: int = 0
    """Number of body bytes that were handed to the socket so far."""
    first_byte: float = 0.0
    """When the first byte was handed to the socket."""
    ended: float = 0.0
    end: str = ""
    """How the response ended. `whole`: it was sent completely. `dropped`: a fault ended it. `gone`: the client closed
    the connection. `cut`: the test reset the connection. Empty until the response has ended."""

    @property
    def range(self) -> str:
        """The Range header; empty if the request has none."""
        return self.headers.get("range", "")

    @property
    def interval(self) -> Interval:
        """The first byte of the blob or manifest that was sent, and the end of the sent bytes."""
        return self.start, self.start + self.sent

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def repeated(intervals: Iterable[Interval]) -> list[Interval]:
    """Returns the parts that are in more than one of the intervals."""
    found: list[Interval] = []
    covered_until = 0
    for start, stop in sorted(intervals):
        if start < covered_until and start < stop:
            found.append((start, min(stop, covered_until)))
        covered_until = max(covered_until, stop)
    return found


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Returns the union of the intervals, in as few intervals as possible."""
    found: list[Interval] = []
    for start, stop in sorted(intervals):
        if start == stop:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found
