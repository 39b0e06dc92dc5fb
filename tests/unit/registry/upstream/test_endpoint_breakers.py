"""The circuit breakers of an endpoint. Failing repositories stop requests for other repositories only for a moment, and
an endpoint that is down gets few requests. A *trial* is a request that is sent after a pause, to find out whether
requests work again."""

from __future__ import annotations

from collections import Counter
from typing import Final, Literal

import pytest

from registry.config import Upstream
from registry.upstream.breaker import FAILURES_TO_OPEN, FIRST_OPEN_SECONDS
from registry.upstream.endpoints import (
    MAX_REPOSITORIES,
    RECOUNT_SECONDS,
    REPOSITORIES_TO_SUSPECT,
    WORKED_SECONDS,
    EndpointSet,
    UpstreamEndpoint,
)
from storage.errors import UpstreamTimeout, UpstreamUnavailable
from tests.fakes.upstream_source import UpstreamClock

Outcome = Literal["works", "503", "hangs", "no connection"]
REQUEST_SECONDS: Final = 0.25
"""Time between two requests of a test, in seconds of the endpoint's clock."""


def test_refused_endpoints_come_after_the_avoided_ones() -> None:
    """Endpoints to avoid come after the other endpoints. Refused endpoints come last, even if they are also to be
    avoided."""
    urls = ["https://a.test", "https://b.test", "https://c.test", "https://d.test"]
    endpoints = EndpointSet(Upstream.model_validate({"name": "far.test", "endpoints": urls}), UpstreamClock())
    ordered = endpoints.in_order("app", avoid={urls[0], urls[1], urls[2]}, untrusted={urls[0]: "error"})
    assert [endpoint.url for endpoint in ordered] == [urls[3], urls[1], urls[2], urls[0]]


class Traffic:
    """Requests to one endpoint, whose breakers decide which of them are sent. `outcomes`: the outcome of the requests
    for each repository. `default`: the outcome for other repositories."""

    def __init__(self, default: Outcome = "works", **outcomes: Outcome) -> None:
        self.clock = UpstreamClock()
        settings = Upstream.model_validate({"name": "far.test", "endpoints": ["https://far.test"]})
        self.endpoint: UpstreamEndpoint = EndpointSet(settings, self.clock).all[0]
        self.default: Outcome = default
        self.outcomes = outcomes
        self.sent: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def request(self, repo: str) -> bool:
        """Sends a request for the repository, if the breakers allow it. Returns whether it was sent."""
        self.clock.now += REQUEST_SECONDS
        if self.endpoint.is_blocked_for(repo):
            self.refused[repo] += 1
            return False
        self.sent[repo] += 1
        outcome = self.outcomes.get(repo, self.default)
        try:
            with self.endpoint.attempt(repo) as attempt:
                attempt.on_send()
                if outcome == "works":
                    attempt.on_headers(200)
                elif outcome == "503":
                    attempt.on_headers(503)
                    raise UpstreamUnavailable("503")
                elif outcome == "hangs":
                    raise UpstreamTimeout("no response")
                else:
                    attempt.on_connection_failed()
                    raise UpstreamUnavailable("cannot be reached")
        except UpstreamUnavailable:
            pass
        return True

    def open_for_all(self, *repos: str) -> None:
        """Requests the failing repositories one after another, until requests for all repositories are stopped."""
        for repo in repos:
            assert self.request(repo)
        assert self.endpoint.is_blocked_for("new")


@pytest.mark.parametrize("failure", ["503", "hangs"])
@pytest.mark.parametrize("repository_count", [REPOSITORIES_TO_SUSPECT, 40])
def test_failing_repositories_stop_the_others_only_for_a_moment(failure: Outcome, repository_count: int) -> None:
    """Three or more repositories fail, and clients keep requesting them. After the first pause, all requests for other
    repositories are sent, and the failing ones still get few requests."""
    traffic = Traffic(**{f"bad{n}": failure for n in range(repository_count)})
    traffic.request("seen")
    traffic.clock.now += WORKED_SECONDS
    traffic.open_for_all("bad0", "bad1", "bad2")
    opened_at = traffic.clock.now
    while traffic.clock.now < opened_at + FIRST_OPEN_SECONDS:
        traffic.request("bad0")
    for count in range(300):
        traffic.request(f"bad{count % repository_count}")
        if count % 4 == 3:
            assert traffic.request("seen")
            assert traffic.request(f"cold{count}")
    if repository_count == REPOSITORIES_TO_SUSPECT:
        assert sum(traffic.sent[f"bad{n}"] for n in range(repository_count)) < 30


@pytest.mark.parametrize("failure", ["503", "hangs"])
def test_failed_trials_of_failing_repositories_do_not_stop_the_others(failure: Outcome) -> None:
    """A repository that already fails gets the first trial after the pause, and the trial fails. Then no other failing
    repository gets a trial, but a request for a repository that has not failed is sent."""
    traffic = Traffic(bad0=failure, bad1=failure, bad2=failure)
    traffic.open_for_all("bad0", "bad1", "bad2")
    traffic.clock.now += FIRST_OPEN_SECONDS
    assert traffic.request("bad0")
    assert not traffic.request("bad1")
    assert traffic.request("good")


def test_running_trial_of_one_repository_does_not_stop_the_others() -> None:
    """A trial that waits for its response does not stop the trials of other repositories that have not failed."""
    traffic = Traffic(bad0="503", bad1="503", bad2="503")
    traffic.open_for_all("bad0", "bad1", "bad2")
    traffic.clock.now += FIRST_OPEN_SECONDS
    with traffic.endpoint.attempt("slow") as attempt:
        attempt.on_send()
        assert traffic.request("good")


def test_failures_do_not_stop_the_others_while_requests_work() -> None:
    """Many repositories fail, one after another. As long as some request works every few seconds, no request for a
    repository that has not failed is stopped."""
    outcomes: dict[str, Outcome] = {f"bad{n}": "503" for n in range(100)}
    traffic = Traffic(**outcomes)
    for count in range(100):
        if count % 10 == 0:
            assert traffic.request(f"good{count}")
        assert traffic.request(f"bad{count}")


def test_failing_repository_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A repository fails for ten minutes, while requests for another one work. The log says only once that the endpoint
    has failures, and not again after each failed trial."""
    traffic = Traffic(bad="503")
    for _ in range(FAILURES_TO_OPEN):
        traffic.request("bad")
    for _ in range(1200):
        assert traffic.request("good")
        traffic.request("bad")
    assert FAILURES_TO_OPEN + 5 < traffic.sent["bad"] < 30
    assert caplog.text.count("does not respond or has server errors") == 1


def test_repositories_get_one_trial_each_when_the_endpoint_works_again() -> None:
    """When a request works after the pause of the endpoint, one trial is sent for each failing repository. If the trial
    works, all requests for the repository are sent again. If the trial fails, they wait."""
    traffic = Traffic(bad0="503", bad1="503", bad2="503")
    traffic.open_for_all("bad0", "bad1", "bad2")
    traffic.clock.now += FIRST_OPEN_SECONDS
    assert traffic.request("good")
    traffic.outcomes["bad0"] = "works"
    assert all(traffic.request("bad0") for _ in range(5))
    with traffic.endpoint.attempt("bad1") as attempt:
        assert not traffic.request("bad1")
        attempt.on_working()
    traffic.outcomes["bad1"] = "works"
    assert traffic.request("bad1")
    assert traffic.request("bad2")
    failed_at = traffic.clock.now
    while traffic.clock.now + REQUEST_SECONDS < failed_at + FIRST_OPEN_SECONDS:
        assert not traffic.request("bad2")
    assert traffic.request("bad2")


def test_repositories_are_served_at_once_after_an_outage() -> None:
    """Requests for 40 repositories fail for a minute. When a request for another repository works, requests for the
    repositories that failed only once are sent at once."""
    repos = [f"name{n}" for n in range(40)]
    traffic = Traffic(default="503")
    ends_at = traffic.clock.now + 60
    while traffic.clock.now < ends_at:
        for repo in repos:
            traffic.request(repo)
    failed_once = [repo for repo in repos if traffic.sent[repo] == 1]
    assert failed_once
    traffic.default = "works"
    while not traffic.request("new"):
        pass
    assert all(traffic.request(repo) for repo in failed_once)


def test_repositories_that_work_and_fail_in_turn_do_not_stop_the_others_again() -> None:
    """Three repositories fail, work and fail again. The second round of failures does not stop other repositories."""
    traffic = Traffic(bad0="503", bad1="503", bad2="503")
    bad_repos = list(traffic.outcomes)
    traffic.open_for_all(*bad_repos)

    def work_and_fail() -> None:
        outcomes: tuple[Outcome, ...] = ("works", "503")
        for outcome in outcomes:
            traffic.clock.now += WORKED_SECONDS
            for repo in bad_repos:
                traffic.outcomes[repo] = outcome
                traffic.request(repo)

    for _ in range(3):
        work_and_fail()
        assert not traffic.endpoint.is_blocked_for("new")
    traffic.clock.now += RECOUNT_SECONDS
    work_and_fail()
    assert traffic.endpoint.is_blocked_for("new")


@pytest.mark.parametrize(("failure", "most_requests"), [("no connection", 10), ("hangs", 60), ("503", 60)])
def test_endpoint_that_is_down_gets_few_requests(failure: Outcome, most_requests: int) -> None:
    """All requests fail for five minutes, for 40 repositories that have worked before. The endpoint gets only a few of
    the 1,200 requests."""
    repos = [f"name{n}" for n in range(40)]
    traffic = Traffic()
    for repo in repos:
        assert traffic.request(repo)
    traffic.sent.clear()
    traffic.default = failure
    for count in range(1200):
        traffic.request(repos[count % len(repos)])
    assert FAILURES_TO_OPEN < traffic.sent.total() <= most_requests
    traffic.default = "works"
    traffic.clock.now += 60
    assert any(traffic.request(repo) for repo in repos)
    assert traffic.request("new")


def test_clock_that_is_set_back_does_not_hide_failures() -> None:
    """After the clock was set back, failures still open the breaker, and its pause still ends."""
    traffic = Traffic(default="503")
    traffic.request("name")
    traffic.clock.now -= 3600
    traffic.request("name")
    traffic.request("name")
    assert not traffic.request("name")
    traffic.clock.now -= 3600
    assert not traffic.request("name")
    assert traffic.endpoint.retry_in_seconds_for("name") <= FIRST_OPEN_SECONDS


@pytest.mark.slow
def test_number_of_remembered_repositories_is_limited() -> None:
    """An endpoint remembers a limited number of failing and of working repositories."""
    traffic = Traffic()
    for number in range(MAX_REPOSITORIES + 5):
        traffic.request(f"good{number}")
    assert len(traffic.endpoint._working) == MAX_REPOSITORIES
    traffic.default = "503"
    for number in range(2 * MAX_REPOSITORIES):
        traffic.request(f"bad{number}")
    assert len(traffic.endpoint._own_breakers) <= MAX_REPOSITORIES
