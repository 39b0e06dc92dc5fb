"""How long a connection may wait for one thing, and what it may be closed as meanwhile."""

from __future__ import annotations

import pytest

from registry.server.connection.timeouts import ConnectionTimeouts, Wait, WaitReason
from registry.server.gate.connection_limit import STALLED_SECONDS

FIRST_BYTE = Wait("first_byte", (0, 0), 15.0)


def body(received: int) -> Wait:
    return Wait("body", (1, received), 60.0)


def test_a_wait_without_progress_ends() -> None:
    """A connection that waits for the same thing for its time has waited too long, and not a moment before."""
    timeouts = ConnectionTimeouts(FIRST_BYTE, 100.0)
    assert timeouts.check(FIRST_BYTE, 114.9) is None
    assert timeouts.check(FIRST_BYTE, 115.0) == "first_byte"


def test_progress_starts_the_time_anew() -> None:
    """Each byte of a body gives the next one the whole time."""
    timeouts = ConnectionTimeouts(FIRST_BYTE, 0.0)
    for number in range(10):
        assert timeouts.check(body(number), 50.0 * number) is None
    assert timeouts.check(body(9), 509.0) is None
    assert timeouts.check(body(9), 510.0) == "body"


def candidate(reason: WaitReason, *, waited: float, begun: int = 5) -> tuple[str, float] | None:
    """Kind and age of a connection that was opened at 0, and has waited for that long at 1000."""
    wait, now = Wait(reason, (1, 1), 60.0), 1000.0
    timeouts = ConnectionTimeouts(FIRST_BYTE, 0.0)
    timeouts.check(wait, now - waited)
    found = timeouts.eviction_candidate(wait, now, requests_started=begun, client="192.0.2.1")
    return None if found is None else (found.kind, now - found.since)


def test_a_new_connection_counts_from_its_start() -> None:
    """One that has sent no complete request is new, however often it sends a byte."""
    assert candidate("first_byte", waited=1.0, begun=0) == ("new", 1000.0)
    assert candidate("head", waited=1.0, begun=1) == ("new", 1000.0)


@pytest.mark.parametrize(("reason", "kind"), [("idle", "idle"), ("head", "idle"), ("linger", "lingering")])
def test_a_silent_connection_may_be_closed(reason: WaitReason, kind: str) -> None:
    """One between requests, or that only waits for its client to leave, counts from when it fell silent."""
    assert candidate(reason, waited=3.0) == (kind, 3.0)


@pytest.mark.parametrize("reason", ["send", "body", "drain", "half_closed"])
def test_a_stalled_connection_may_be_closed(reason: WaitReason) -> None:
    """One with a request in progress may be closed once its client has neither sent nor taken a byte for a while."""
    assert candidate(reason, waited=STALLED_SECONDS) == ("stalled", STALLED_SECONDS)
    assert candidate(reason, waited=STALLED_SECONDS - 1) is None


def test_a_connection_with_work_stays() -> None:
    """One whose request the application works for is not closed, however long that takes."""
    assert candidate("application", waited=900.0) is None


def test_the_address_is_the_network() -> None:
    """Of an IPv6 client its network counts; a trusted proxy has no address."""
    idle = Wait("idle", (1, 0), 75.0)
    timeouts = ConnectionTimeouts(FIRST_BYTE, 0.0)
    found = timeouts.eviction_candidate(idle, 1.0, requests_started=1, client="2001:db8::1")
    assert found is not None
    assert found.address == "2001:db8::/64"
    found = timeouts.eviction_candidate(idle, 1.0, requests_started=1, client=None)
    assert found is not None
    assert found.address is None
