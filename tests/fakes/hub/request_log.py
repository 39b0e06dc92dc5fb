"""The record of requests to the fake Hub, with the bytes of body it handed to the socket for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from .switches import HubRequestKind

Interval = tuple[int, int]


@dataclass
class SeenRequest:
    """A request and the progress of its response."""

    kind: HubRequestKind
    method: str
    path: str
    """With the query, as the client sent it."""
    headers: dict[str, str] = field(repr=False)
    """By name in lower case; Authorization is left out."""
    authorization: bool
    """Whether it had an Authorization header."""
    begun: float
    """When it arrived, by the monotonic clock, which is the same in all processes."""
    digest: str = ""
    """The digest of the requested blob, or of the manifest in the response."""
    status: int = 0
    start: int = 0
    stop: int = 0
    """The bytes from `start` to `stop` of the blob or manifest are in the response, by its headers."""
    sent: int = 0
    """Number of bytes of the body handed to the socket so far."""
    first_byte: float = 0.0
    """When the first byte was handed to the socket."""
    ended: float = 0.0
    end: str = ""
    """How the response ended: `whole`; `dropped` by a fault; `gone`: the client has closed the connection; `cut` by the
    test. Empty until it has ended."""

    @property
    def range(self) -> str:
        """The Range header; empty without one."""
        return self.headers.get("range", "")

    @property
    def interval(self) -> Interval:
        """The bytes of the blob or manifest that were sent."""
        return self.start, self.start + self.sent

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def repeated(intervals: Iterable[Interval]) -> list[Interval]:
    """Returns what is in more than one of the intervals."""
    found: list[Interval] = []
    reach = 0
    for start, stop in sorted(intervals):
        if start < reach and start < stop:
            found.append((start, min(stop, reach)))
        reach = max(reach, stop)
    return found


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Returns what is in at least one of the intervals, in as few intervals as possible."""
    found: list[Interval] = []
    for start, stop in sorted(intervals):
        if start == stop:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found
