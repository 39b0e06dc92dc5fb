"""`WebhookHealth` decides how long the deliveries of events wait: after failures of the whole endpoint of a webhook,
and after failures of one repository's events."""

from __future__ import annotations

import pytest

from registry.events.attempts import FIRST_PAUSE_SECONDS, LONGEST_ENDPOINT_PAUSE_SECONDS, WebhookHealth
from tests.fakes.upkeep_store import Clock

A, B = "team/a", "team/b"


@pytest.fixture
def clock() -> Clock:
    return Clock(0.0)


@pytest.fixture
def health(clock: Clock) -> WebhookHealth:
    return WebhookHealth(clock)


def fail_repeatedly(health: WebhookHealth, clock: Clock, repository: str, times: int) -> None:
    """Reports `times` failed attempts for the repository, one after the other. The endpoint accepts no other event
    during these attempts, so each failure pauses the endpoint, and `on_down` returns no further wait."""
    for _ in range(times):
        repository_wait = health.on_down(repository, health.delivered_count)
        assert repository_wait == 0.0
        assert health.is_paused
        clock.now += 1000


def test_a_repository_that_fails_alone_delays_others_for_seconds(health: WebhookHealth, clock: Clock) -> None:
    """If the events of one repository fail, and no others are sent, the events of other repositories wait for seconds
    at most. The events of the failing repository wait for minutes."""
    fail_repeatedly(health, clock, A, 12)
    health.on_down(A, health.delivered_count)
    clock.now += LONGEST_ENDPOINT_PAUSE_SECONDS
    assert not health.is_paused
    assert health.paused_repositories()[A] > clock.now + 100
    assert B not in health.paused_repositories()


def test_one_success_ends_all_pauses(health: WebhookHealth, clock: Clock) -> None:
    """After failures for many repositories, one success ends the pauses of all of them."""
    for number in range(20):
        fail_repeatedly(health, clock, f"team/{number}", 1)
    health.on_down(A, health.delivered_count)
    health.on_delivered(B)
    assert (dict(health.paused_repositories()), health.failures) == ({}, 0)
    clock.now += FIRST_PAUSE_SECONDS
    assert not health.is_paused


def test_failures_at_the_same_time_count_once(health: WebhookHealth) -> None:
    """Several requests can be running when the endpoint goes down. They count as one failure."""
    for number in range(4):
        health.on_down(f"team/{number}", 0)
    assert health.failures == 1


def test_only_the_repository_whose_events_fail_is_paused(health: WebhookHealth, clock: Clock) -> None:
    """If only the events of one repository fail, each pause of this repository is longer than the one before. The
    endpoint has no pause, because it accepted another repository's event during each attempt."""
    pauses = []
    for _ in range(6):
        delivered_before = health.delivered_count
        health.on_delivered(B)
        pauses.append(health.on_down(A, delivered_before))
    assert not health.is_paused
    # The pauses double, and half of each pause is random.
    assert all(0.5 * 2**number <= pause <= 2**number for number, pause in enumerate(pauses))
    health.on_delivered(A)
    delivered_before = health.delivered_count
    health.on_delivered(B)
    assert health.on_down(A, delivered_before) <= 1.0
