"""How long a connection may wait for its client, and when it may be closed in favour of other connections. Times are
in seconds."""

from __future__ import annotations

import pytest

from registry.server.connection.timeouts import ConnectionTimeouts, Wait, WaitReason
from registry.server.gate.connection_limit import STALLED_SECONDS

FIRST_BYTE = Wait("first_byte", (0, 0), 15.0)


def body_wait(received: int) -> Wait:
    """Returns a wait for the rest of a request's body, of which `received` bytes have arrived."""
    return Wait("body", (1, received), 60.0)


def test_a_wait_without_progress_ends() -> None:
    """A connection times out when it has waited for the same thing for the whole timeout, and not earlier."""
    timeouts = ConnectionTimeouts(FIRST_BYTE, 100.0)
    assert timeouts.check(FIRST_BYTE, 114.9) is None
    assert timeouts.check(FIRST_BYTE, 115.0) == "first_byte"


def test_progress_restarts_the_timeout() -> None:
    """Each byte of a body restarts the timeout."""
    timeouts = ConnectionTimeouts(FIRST_BYTE, 0.0)
    for number in range(10):
        assert timeouts.check(body_wait(number), 50.0 * number) is None
    assert timeouts.check(body_wait(9), 509.0) is None
    assert timeouts.check(body_wait(9), 510.0) == "body"


def eviction_kind_and_age(reason: WaitReason, *, waited: float, requests_started: int = 5) -> tuple[str, float] | None:
    """Returns the kind and the age of a connection at the time 1000; None if the connection must not be closed. The
    connection was opened at the time 0, has started `requests_started` requests, and has waited for `waited`
    seconds."""
    wait, now = Wait(reason, (1, 1), 60.0), 1000.0
    timeouts = ConnectionTimeouts(FIRST_BYTE, 0.0)
    timeouts.check(wait, now - waited)
    candidate = timeouts.eviction_candidate(wait, now, requests_started=requests_started, client="192.0.2.1")
    return None if candidate is None else (candidate.kind, now - candidate.since)


def test_age_of_a_new_connection_counts_from_its_start() -> None:
    """A connection that has sent no complete request counts as new, and its age counts from its start, even if it sends
    a byte now and then."""
    assert eviction_kind_and_age("first_byte", waited=1.0, requests_started=0) == ("new", 1000.0)
    assert eviction_kind_and_age("head", waited=1.0, requests_started=1) == ("new", 1000.0)


@pytest.mark.parametrize(("reason", "kind"), [("idle", "idle"), ("head", "idle"), ("linger", "lingering")])
def test_a_silent_connection_may_be_closed(reason: WaitReason, kind: str) -> None:
    """A connection between two requests, or one that only waits for its client to disconnect, may be closed. Its age
    counts from the time when it fell silent."""
    assert eviction_kind_and_age(reason, waited=3.0) == (kind, 3.0)


@pytest.mark.parametrize("reason", ["send", "body", "drain", "half_closed"])
def test_a_stalled_connection_may_be_closed(reason: WaitReason) -> None:
    """A connection with a request in progress may be closed if its client has neither sent nor received a byte for a
    while."""
    assert eviction_kind_and_age(reason, waited=STALLED_SECONDS) == ("stalled", STALLED_SECONDS)
    assert eviction_kind_and_age(reason, waited=STALLED_SECONDS - 1) is None


def test_a_connection_stays_open_while_the_application_works() -> None:
    """A connection is not closed while the application works on its request, even if the work takes long."""
    assert eviction_kind_and_age("application", waited=900.0) is None


def test_address_of_an_ipv6_client_is_its_network() -> None:
    """Connections are counted by address. For an IPv6 client, this address is its /64 network. For a trusted proxy, it
    is None."""
    idle = Wait("idle", (1, 0), 75.0)
    timeouts = ConnectionTimeouts(FIRST_BYTE, 0.0)
    candidate = timeouts.eviction_candidate(idle, 1.0, requests_started=1, client="2001:db8::1")
    assert candidate is not None
    assert candidate.address == "2001:db8::/64"
    candidate = timeouts.eviction_candidate(idle, 1.0, requests_started=1, client=None)
    assert candidate is not None
    assert candidate.address is None
