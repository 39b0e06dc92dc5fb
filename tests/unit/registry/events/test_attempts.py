"""How long an endpoint that is down, and repositories whose events it does not take, have to wait."""

from __future__ import annotations

import pytest

from registry.events.attempts import FIRST_PAUSE_SECONDS, LONGEST_ENDPOINT_PAUSE_SECONDS, EndpointHealth
from tests.fakes.upkeep_store import Clock

A, B = "team/a", "team/b"


@pytest.fixture
def clock() -> Clock:
    return Clock(0.0)


@pytest.fixture
def health(clock: Clock) -> EndpointHealth:
    return EndpointHealth(clock)


def fail(health: EndpointHealth, clock: Clock, repository: str, times: int) -> None:
    """That many attempts for the repository find the endpoint down, one after the other."""
    for _ in range(times):
        assert health.on_down(repository, health.delivered) == 0.0
        assert health.is_paused
        clock.now += 1000


def test_a_repository_that_fails_alone_delays_others_for_seconds(health: EndpointHealth, clock: Clock) -> None:
    """However often its event has failed, and although it waits for minutes itself."""
    fail(health, clock, A, 12)
    health.on_down(A, health.delivered)
    clock.now += LONGEST_ENDPOINT_PAUSE_SECONDS
    assert not health.is_paused
    assert health.pauses()[A] > clock.now + 100
    assert B not in health.pauses()


def test_nobody_waits_when_the_endpoint_is_up_again(health: EndpointHealth, clock: Clock) -> None:
    """Each of many repositories has failed; one success ends their pauses."""
    for number in range(20):
        fail(health, clock, f"team/{number}", 1)
    health.on_down(A, health.delivered)
    health.on_delivered(B)
    assert (dict(health.pauses()), health.failures) == ({}, 0)
    clock.now += FIRST_PAUSE_SECONDS
    assert not health.is_paused


def test_failures_at_the_same_time_count_once(health: EndpointHealth) -> None:
    """Such as those of four requests that were running when the endpoint went down."""
    for number in range(4):
        health.on_down(f"team/{number}", 0)
    assert health.failures == 1


def test_a_repository_whose_events_alone_fail_waits_by_itself(health: EndpointHealth, clock: Clock) -> None:
    """Longer each time; the endpoint does not pause, since it took other events during the attempt."""
    pauses = []
    for _ in range(6):
        before = health.delivered
        health.on_delivered(B)
        pauses.append(health.on_down(A, before))
    assert not health.is_paused
    assert all(0.5 * 2**number <= pause <= 2**number for number, pause in enumerate(pauses))
    health.on_delivered(A)
    before = health.delivered
    health.on_delivered(B)
    assert health.on_down(A, before) <= 1.0
