"""How long, and at which intervals, the download of a blob from an upstream is retried, and from which repository."""

from __future__ import annotations

from itertools import pairwise

import pytest

from registry.mirror.fill.retry import (
    LONGEST_PAUSE_SECONDS,
    MIN_PROGRESS_BYTES,
    STALL_TIMEOUT_SECONDS,
    RepositoryChoice,
    RetryPolicy,
)
from storage.errors import RegistryError, TooManyRequests, UpstreamTimeout, UpstreamUnavailable
from storage.names import RepositoryName

A, B, C = (RepositoryName(name) for name in "abc")


def attempts(
    policy: RetryPolicy, error: RegistryError, *, has_response: bool, received: int = 0, now: float = 0.0
) -> list[float]:
    """Returns the times of all retries, in seconds, if each retry fails at once. After them comes the time at which the
    download is given up, which is that of the last retry."""
    times = []
    while policy.should_retry(error, now, received, has_response=has_response):
        assert policy.resume_at > now
        now = policy.resume_at
        times.append(now)
    return [*times, now]


def test_a_download_that_has_begun_is_retried_until_the_stall_timeout() -> None:
    """The download of a blob with readers is retried at once, then after growing pauses of up to two seconds, for 45 s
    in all. This is longer than a restart of an upstream and the first pause of a circuit breaker."""
    times = attempts(RetryPolicy(), UpstreamUnavailable(), has_response=True)
    assert times[0] == 0.1
    assert max(following - time for time, following in pairwise(times)) == pytest.approx(LONGEST_PAUSE_SECONDS)
    assert STALL_TIMEOUT_SECONDS - LONGEST_PAUSE_SECONDS < times[-1] <= STALL_TIMEOUT_SECONDS


def test_progress_starts_the_time_anew() -> None:
    """Progress restarts the stall timeout. A few bytes do not count as progress."""
    policy, error = RetryPolicy(), UpstreamUnavailable()
    assert policy.should_retry(error, 0.0, 0, has_response=True)
    assert policy.should_retry(error, 40.0, MIN_PROGRESS_BYTES, has_response=True)
    assert policy.should_retry(error, 80.0, MIN_PROGRESS_BYTES + 100, has_response=True)
    assert not policy.should_retry(error, 90.0, MIN_PROGRESS_BYTES + 200, has_response=True)


def test_a_short_retry_after_is_waited_for() -> None:
    """If the time in a Retry-After header ends before the stall timeout, the download waits for it and retries.
    Otherwise the download is given up at once."""
    policy = RetryPolicy()
    assert policy.should_retry(TooManyRequests(retry_after=20), 0.0, 0, has_response=True)
    assert policy.resume_at == 20.0
    assert not policy.should_retry(TooManyRequests(retry_after=30), 20.0, 0, has_response=True)
    assert not RetryPolicy().should_retry(TooManyRequests(retry_after=60), 0.0, 0, has_response=True)
    assert not RetryPolicy().should_retry(TooManyRequests(retry_after=5), 0.0, 0, has_response=False)


@pytest.mark.parametrize(("error", "most"), [(UpstreamUnavailable(), 2), (UpstreamTimeout(), 1)])
def test_a_download_without_a_first_byte_is_given_up_soon(error: RegistryError, most: int) -> None:
    """If no byte has arrived, the download is given up after at most one retry, because the client can still use
    another registry."""
    times = attempts(RetryPolicy(), error, has_response=False)
    assert len(times) == most
    assert times[-1] < 0.5


def test_repository_is_left_after_two_failures_in_a_row() -> None:
    """The repository that has sent bytes is asked again after one failure, and after each failure that follows
    progress. After two failures in a row, another repository is asked."""
    choice = RepositoryChoice(A, lambda: [A, B, C])
    choice.on_bytes(A)
    for _ in range(3):
        choice.on_failure(A, has_progress=True)
        assert choice.next_repo == A
    choice.on_failure(A, has_progress=False)
    assert choice.next_repo == B


def test_sender_is_asked_again_before_each_other_repository() -> None:
    """If no repository sends bytes any more, the one that has sent bytes last and the others are asked alternately."""
    choice = RepositoryChoice(A, lambda: [A, B, C])
    chosen = []
    for _ in range(5):
        choice.on_failure(choice.next_repo, has_progress=False)
        choice.on_failure(choice.next_repo, has_progress=False)
        chosen.append(choice.next_repo)
    assert chosen == [B, A, C, A, B]


def test_repository_that_refuses_the_blob_is_not_asked_again() -> None:
    """A repository is left after its first refusal. It is asked again only if all repositories have refused."""
    choice = RepositoryChoice(A, lambda: [A, B, C])
    choice.on_refusal(A)
    assert choice.next_repo == B
    choice.on_bytes(B)
    choice.on_refusal(C)
    for _ in range(4):
        choice.on_failure(B, has_progress=False)
        assert choice.next_repo == B
    assert choice.has_usable_repo
    choice.on_refusal(B)
    assert not choice.has_usable_repo
    assert choice.next_repo == B


def test_only_usable_repository_is_kept_when_the_sender_has_refused() -> None:
    """Repository A has sent bytes and then refuses the blob. B is the only usable repository. It is asked after each
    failure, and A is not asked again."""
    choice = RepositoryChoice(A, lambda: [A, B])
    choice.on_bytes(A)
    choice.on_refusal(A)
    for _ in range(4):
        choice.on_failure(B, has_progress=False)
        assert choice.next_repo == B


def test_late_failure_of_a_repository_does_not_count_for_another() -> None:
    """Requests to repository A fail after B was chosen instead. They do not count as failures of B, which stays
    chosen."""
    choice = RepositoryChoice(A, lambda: [A, B, C])
    choice.on_refusal(A)
    choice.on_refusal(A)
    choice.on_failure(A, has_progress=False)
    choice.on_failure(B, has_progress=False)
    choice.on_failure(A, has_progress=False)
    assert choice.next_repo == B
