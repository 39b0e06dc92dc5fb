"""The recorder of requests, which counts each request in the metrics and writes its line to the access log."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

from registry.asgi import REQUEST_NOTES_EXTENSION, Scope
from registry.http.answer_cache import CachedAnswer
from registry.server.connection.request_reports import RequestEnd, partial_scope
from registry.telemetry.metric_families import Family
from registry.telemetry.metrics import Metrics
from registry.telemetry.request_recorder import RequestRecorder
from storage.content import Actor

ENDED = RequestEnd(200, 10, 20, 0.004, is_complete=True)
CUT_OFF = RequestEnd(200, 10, 20, 0.004, is_complete=False)


class NotedRequest:
    """The data that the distribution API records about a request."""

    kind = "manifests"
    repo = "ubuntu"
    resource_id = "24.04"
    request_id = "r1"
    principal_name = "alice"
    cache_state = "stale"
    upstream = "docker.io"


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics(["docker.io"], workers=1)
    metrics.start_worker()
    return metrics


@pytest.fixture
def recorder(metrics: Metrics) -> RequestRecorder:
    return RequestRecorder(metrics)


def scope_for(path: str, noted: object = None, method: str = "GET", agent: bytes = b"docker/29") -> Scope:
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "headers": [(b"user-agent", agent), (b"x-request-id", b"r2")],
        "client": ("192.0.2.7", 40000),
        "extensions": {REQUEST_NOTES_EXTENSION: {} if noted is None else {"exchange": noted}},
    }


def counts(metrics: Metrics, family: Family) -> dict[tuple[str, ...], float]:
    totals = metrics.totals()
    return {values: totals[cell] for values, cell in family.series() if totals[cell]}


def test_a_complete_request(metrics: Metrics, recorder: RequestRecorder) -> None:
    """A complete request is counted by route, method and status. Its bytes and the state of the mirror's cache are
    counted as well."""
    recorder.on_request_end(scope_for("/v2/ubuntu/manifests/24.04", NotedRequest()), ENDED)
    assert counts(metrics, metrics.requests) == {("manifests", "GET", "200"): 1}
    assert counts(metrics, metrics.received_bytes) == {("manifests",): 10}
    assert counts(metrics, metrics.sent_bytes) == {("manifests",): 20}
    assert counts(metrics, metrics.mirror.requests) == {("0", "manifests", "stale"): 1}
    assert counts(metrics, metrics.mirror.served_bytes) == {("0", "manifests", "stale"): 20}


def test_a_request_that_was_cut_off(metrics: Metrics, recorder: RequestRecorder) -> None:
    """A response that was cut off counts as aborted, not as a request. Its bytes count."""
    recorder.on_request_end(scope_for("/v2/ubuntu/manifests/24.04", NotedRequest()), CUT_OFF)
    assert counts(metrics, metrics.requests) == {}
    assert counts(metrics, metrics.aborted) == {("manifests", "GET"): 1}
    assert counts(metrics, metrics.sent_bytes) == {("manifests",): 20}


def test_requests_that_the_server_refuses(metrics: Metrics, recorder: RequestRecorder) -> None:
    """A request that the server refuses without calling the application counts as a request. A connection that is
    closed without a response does not."""
    recorder.on_refused(partial_scope(None), RequestEnd(400, 0, 5, 0.0, is_complete=True, reason="bad"))
    recorder.on_refused(partial_scope(None), RequestEnd(0, 0, 0, 0.0, is_complete=False, reason="too many"))
    assert counts(metrics, metrics.requests) == {("other", "other", "400"): 1}
    assert counts(metrics, metrics.aborted) == {}


def test_log_line_of_a_request_that_the_server_refuses(
    recorder: RequestRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """The log line of a request that the server refuses has the reason before the user agent, because the client
    chooses the user agent and could add a false reason to it. Unknown values are `-`."""
    known = partial_scope(
        ("192.0.2.7", 1), "GET", b"/v2/", [(b"user-agent", b'a reason="none"'), (b"x-request-id", b"r2")]
    )
    with caplog.at_level(logging.INFO, "registry.access"):
        recorder.on_refused(known, RequestEnd(431, 0, 5, 0.0, is_complete=True, reason="the headers are too large"))
        recorder.on_refused(partial_scope(None), RequestEnd(0, 0, 0, 0.0, is_complete=False, reason="too many"))
    first, second = caplog.messages
    assert first == (
        "GET /v2/ status=431 bytes=5 received=0 ms=0.0 principal=- address=192.0.2.7 repository=- reference=- cache=- "
        'request=r2 trace=- reason="the headers are too large" agent=a reason="none"'
    )
    assert second.startswith("- - status=0 bytes=0 ")
    assert second.endswith(' trace=- reason="too many" agent=-')


@pytest.mark.parametrize(
    ("path", "route"),
    [
        *(("/api/v1/users", "api"), ("/token", "token"), ("/login/callback", "login"), ("/logout", "login")),
        *(("/ui/repositories", "pages"), ("/v1/search", "search")),
        *(("/health/ready", "health"), ("/livez", "health"), ("/metrics", "metrics"), ("/", "other"), ("/x", "other")),
    ],
)
def test_routes_outside_v2(metrics: Metrics, recorder: RequestRecorder, path: str, route: str) -> None:
    """Paths outside `/v2` are counted by the kind of route. A path that does not exist counts as the route `other`, so
    that clients cannot create series."""
    recorder.on_request_end(scope_for(path, method="BREW"), ENDED)
    assert counts(metrics, metrics.requests) == {(route, "other", "200"): 1}


def test_log_line_of_a_request(recorder: RequestRecorder, caplog: pytest.LogCaptureFixture) -> None:
    """The log line of a request has its method, path, status, bytes, duration, principal, address, repository,
    reference, cache state, ids and user agent."""
    with caplog.at_level(logging.INFO, "registry.access"):
        recorder.on_request_end(scope_for("/v2/ubuntu/manifests/24.04", NotedRequest()), ENDED)
    assert caplog.messages == [
        "GET /v2/ubuntu/manifests/24.04 status=200 bytes=20 received=10 ms=4.0 principal=alice address=192.0.2.7 "
        "repository=ubuntu reference=24.04 cache=stale request=r1 trace=- agent=docker/29"
    ]


def test_log_line_of_an_incomplete_response(recorder: RequestRecorder, caplog: pytest.LogCaptureFixture) -> None:
    """The log line of an incomplete response has the text "(cut off)" after the status. The line of a request to the
    management API names the authenticated account."""
    scope: Any = scope_for("/api/v1/users")
    scope["state"] = {"actor": Actor("bob", "192.0.2.7", "r3"), "request_id": "r3"}
    with caplog.at_level(logging.INFO, "registry.access"):
        recorder.on_request_end(scope, CUT_OFF)
    assert re.search(r"status=200\(cut off\) .* principal=bob .* request=r3 ", caplog.text)


def test_control_characters_of_a_user_agent_are_replaced(
    recorder: RequestRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log line, control characters and line breaks of a User-Agent are replaced, and a long User-Agent is cut
    off."""
    with caplog.at_level(logging.INFO, "registry.access"):
        recorder.on_request_end(scope_for("/", agent=b"a\x1b[2Jb\x9bc\n" + b"x" * 1000), ENDED)
    (line,) = caplog.messages
    assert "agent=a?[2Jb?c?xxx" in line
    assert len(line) < 600


def test_a_cached_answer(metrics: Metrics, recorder: RequestRecorder, caplog: pytest.LogCaptureFixture) -> None:
    """A response from the response cache counts as a request and as a cached answer. Its log line states that it was
    cached."""
    answer = CachedAnswer([], [], b"12345", "alice", True, None, "manifests", "team/app", "1")
    with caplog.at_level(logging.INFO, "registry.access"):
        for _ in range(3):
            recorder.on_cached_answer(scope_for("/v2/team/app/manifests/1"), answer, "r9")
    assert counts(metrics, metrics.requests) == {("manifests", "GET", "200"): 3}
    assert counts(metrics, metrics.sent_bytes) == {("manifests",): 15}
    assert counts(metrics, metrics.cached_answers) == {("manifests",): 3}
    assert counts(metrics, metrics.seconds) == {("manifests", "GET"): 3}
    assert "repository=team/app reference=1 cache=answer request=r9" in caplog.messages[-1]


@pytest.mark.parametrize("size", [0, 1, 1024, 1025, 64 * 1024])
@pytest.mark.parametrize(("kind", "method"), [("ping", "GET"), ("manifests", "HEAD"), ("session", "GET")])
@pytest.mark.slow
def test_a_cached_answer_counts_like_other_responses(kind: str, method: str, size: int) -> None:
    """A cached answer is counted in the same series and with the same values as another response. In addition, it
    counts as a cached answer."""
    cached, answered = Metrics([], workers=1), Metrics([], workers=1)
    for metrics in (cached, answered):
        metrics.start_worker()
    answer = CachedAnswer([], [], b"x" * size, "alice", True, None, kind, "team/app", "1")
    noted = NotedRequest()
    noted.kind, noted.cache_state = kind, ""
    for _ in range(2):
        RequestRecorder(cached).on_cached_answer(scope_for("/", method=method), answer, "r9")
        end = RequestEnd(200, 0, size, 0.0, is_complete=True)
        RequestRecorder(answered).on_request_end(scope_for("/", noted, method=method), end)
    assert counts(cached, cached.cached_answers) == {(kind,): 2}
    assert counts(answered, answered.cached_answers) == {}
    for cached_family, answered_family in zip(cached.plan.families, answered.plan.families, strict=True):
        if cached_family is not cached.cached_answers:
            numbers = dict(cached_family.nonzero_series(cached.totals()))
            assert numbers == dict(answered_family.nonzero_series(answered.totals())), cached_family.name


def test_a_reference_cannot_start_a_new_log_line(recorder: RequestRecorder, caplog: pytest.LogCaptureFixture) -> None:
    """A reference with a line break cannot start a new log line. The reference is the decoded last part of a path, and
    is logged even if it is invalid."""
    noted = NotedRequest()
    noted.resource_id = "x\n2026-01-01 00:00:00,000 INFO forged \x1b[31m" + 300 * "y"
    with caplog.at_level(logging.INFO, "registry.access"):
        recorder.on_request_end(scope_for("/v2/ubuntu/manifests/x%0A", noted), ENDED)
    [line] = caplog.messages
    assert line.isprintable()
    assert "reference=x?2026-01-01?00:00:00,000?INFO?forged??[31myyy" in line
    assert "y" * 256 not in line
