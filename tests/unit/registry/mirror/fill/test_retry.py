"""For how long a blob is gone on with when its connections break."""

from __future__ import annotations

from itertools import pairwise

import pytest

from registry.mirror.fill.retry import LONGEST_RETRY_SECONDS, MIN_PROGRESS, STALL_TIMEOUT_SECONDS, RetryPolicy
from storage.errors import RegistryError, TooManyRequests, UpstreamTimeout, UpstreamUnavailable


def attempts(
    breaks: RetryPolicy, error: RegistryError, *, has_begun: bool, received: int = 0, now: float = 0.0
) -> list[float]:
    """When it is tried again, where every attempt fails at once; the last is when it is given up."""
    times = []
    while breaks.should_retry(error, now, received, has_begun=has_begun):
        assert breaks.resume_at > now
        now = breaks.resume_at
        times.append(now)
    return [*times, now]


def test_what_has_begun_goes_by_time() -> None:
    """It is tried again within moments at first, every two seconds at the latest later, and for three quarters of a
    minute: longer than an upstream takes that is started anew, and than one that failed is left alone at first."""
    times = attempts(RetryPolicy(), UpstreamUnavailable(), has_begun=True)
    assert times[0] == 0.1
    assert max(two - one for one, two in pairwise(times)) == pytest.approx(LONGEST_RETRY_SECONDS)
    assert STALL_TIMEOUT_SECONDS - LONGEST_RETRY_SECONDS < times[-1] <= STALL_TIMEOUT_SECONDS


def test_progress_starts_the_time_anew() -> None:
    """Bytes worth counting do; a few do not."""
    breaks, error = RetryPolicy(), UpstreamUnavailable()
    assert breaks.should_retry(error, 0.0, 0, has_begun=True)
    assert breaks.should_retry(error, 40.0, MIN_PROGRESS, has_begun=True)
    assert breaks.should_retry(error, 80.0, MIN_PROGRESS + 100, has_begun=True)
    assert not breaks.should_retry(error, 90.0, MIN_PROGRESS + 200, has_begun=True)


def test_a_limit_is_waited_out_where_that_helps() -> None:
    """As long as it asks for, if there is time for it; else nothing is waited for."""
    breaks = RetryPolicy()
    assert breaks.should_retry(TooManyRequests(retry_after=20), 0.0, 0, has_begun=True)
    assert breaks.resume_at == 20.0
    assert not breaks.should_retry(TooManyRequests(retry_after=30), 20.0, 0, has_begun=True)
    assert not RetryPolicy().should_retry(TooManyRequests(retry_after=60), 0.0, 0, has_begun=True)
    assert not RetryPolicy().should_retry(TooManyRequests(retry_after=5), 0.0, 0, has_begun=False)


@pytest.mark.parametrize(("error", "most"), [(UpstreamUnavailable(), 2), (UpstreamTimeout(), 1)])
def test_what_has_not_begun_is_given_up_soon(error: RegistryError, most: int) -> None:
    """Whoever waits can still go elsewhere."""
    times = attempts(RetryPolicy(), error, has_begun=False)
    assert len(times) == most
    assert times[-1] < 0.5
