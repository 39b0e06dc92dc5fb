"""How long a connection may wait for something, and when it may be closed to make room for others."""

from __future__ import annotations

import pytest

from registry.server.connection.timeouts import ConnectionTimeouts, Wait, WaitReason
from registry.server.gate.connection_limit import STALLED_SECONDS

FIRST_BYTE = Wait("first_byte", (0, 0), 15.0)


def body(received: int) -> Wait:
    return Wait("body", (1, received), 60.0)


def test_a_wait_without_progress_ends() -> None:
    """A connection has waited too long when it has waited for the same thing for the whole timeout, and not earlier."""
    timeouts = ConnectionTimeouts(FIRST_BYTE, 100.0)
    assert timeouts.check(FIRST_BYTE, 114.9) is None
    assert timeouts.check(FIRST_BYTE, 115.0) == "first_byte"


def test_progress_starts_the_time_anew() -> None:
    """Each byte of a body restarts the timeout."""
    timeouts = ConnectionTimeouts(FIRST_BYTE, 0.0)
    for number in range(10):
        assert timeouts.check(body(number), 50.0 * number) is None
    assert timeouts.check(body(9), 509.0) is None
    assert timeouts.check(body(9), 510.0) == "body"


def candidate(reason: WaitReason, *, waited: float, begun: int = 5) -> tuple[str, float] | None:
    """Returns the kind and the age of a connection at the time 1000; None if it must not be closed. It was opened at 0,
    has begun `begun` requests, and has waited for `waited` seconds."""
    wait, now = Wait(reason, (1, 1), 60.0), 1000.0
    timeouts = ConnectionTimeouts(FIRST_BYTE, 0.0)
    timeouts.check(wait, now - waited)
    found = timeouts.eviction_candidate(wait, now, requests_started=begun, client="192.0.2.1")
    return None if found is None else (found.kind, now - found.since)


def test_a_new_connection_counts_from_its_start() -> None:
    """A connection that has sent no complete request counts as new, and its age counts from its start, even if it sends
    a byte now and then."""
    assert candidate("first_byte", waited=1.0, begun=0) == ("new", 1000.0)
    assert candidate("head", waited=1.0, begun=1) == ("new", 1000.0)


@pytest.mark.parametrize(("reason", "kind"), [("idle", "idle"), ("head", "idle"), ("linger", "lingering")])
def test_a_silent_connection_may_be_closed(reason: WaitReason, kind: str) -> None:
    """A connection between two requests, or one that only waits for its client to disconnect, may be closed. Its age
    counts from the time when it fell silent."""
    assert candidate(reason, waited=3.0) == (kind, 3.0)


@pytest.mark.parametrize("reason", ["send", "body", "drain", "half_closed"])
def test_a_stalled_connection_may_be_closed(reason: WaitReason) -> None:
    """A connection with a request in progress may be closed if its client has neither sent nor received a byte for a
    while."""
    assert candidate(reason, waited=STALLED_SECONDS) == ("stalled", STALLED_SECONDS)
    assert candidate(reason, waited=STALLED_SECONDS - 1) is None


def test_a_connection_with_work_stays() -> None:
    """A connection is not closed while the application works on its request, however long that takes."""
    assert candidate("application", waited=900.0) is None


def test_the_address_is_the_network() -> None:
    """For an IPv6 client, the network takes the place of the address. A trusted proxy has no address here."""
    idle = Wait("idle", (1, 0), 75.0)
    timeouts = ConnectionTimeouts(FIRST_BYTE, 0.0)
    found = timeouts.eviction_candidate(idle, 1.0, requests_started=1, client="2001:db8::1")
    assert found is not None
    assert found.address == "2001:db8::/64"
    found = timeouts.eviction_candidate(idle, 1.0, requests_started=1, client=None)
    assert found is not None
    assert found.address is None
