"""Reading the request id and the trace id from the scope of a request."""

from __future__ import annotations

import re

import pytest

from registry.asgi import request_id_of, trace_id_of

TRACE = b"0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize("given", ["abc", "4c1b7c5e-7f5c-4f0e-9d2c-0a3c2a6f3f11", "a/b:c+d=_.", "x" * 64])
def test_a_usual_request_id_is_taken(given: str) -> None:
    """A request id of usual characters is used, whether the client or a proxy has sent it."""
    assert request_id_of([(b"host", b"x"), (b"x-request-id", given.encode())]) == given


@pytest.mark.parametrize("given", [b"", b"x" * 65, b"a b", b"a\x1b[0m", b"a\xe4", b"a;b", b"a\n"])
def test_an_unusual_request_id_is_not_taken(given: bytes) -> None:
    """An unusual request id is replaced by random hex digits, because it is written to logs and headers."""
    assert re.fullmatch("[0-9a-f]{16}", request_id_of([(b"x-request-id", given)]))


def test_requests_without_an_id_get_one() -> None:
    """Each request without an id gets an id of its own."""
    assert len({request_id_of([]) for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("given", "trace"),
    [
        (b"00-" + TRACE + b"-b7ad6b7169203331-01", TRACE.decode()),
        (b"00-" + TRACE + b"-b7ad6b7169203331-00", TRACE.decode()),
        (b"00-" + b"0" * 32 + b"-b7ad6b7169203331-01", ""),
        (b"00-" + TRACE.upper() + b"-b7ad6b7169203331-01", ""),
        (b"ff-" + TRACE + b"-b7ad6b7169203331-01", ""),
        (TRACE, ""),
    ],
)
def test_trace_ids(given: bytes, trace: str) -> None:
    """A valid traceparent gives the trace id. An invalid one counts as missing (W3C Trace Context, 3.2)."""
    assert trace_id_of([(b"traceparent", given)]) == trace
