"""The request id and the trace id, which are read from the headers of a request."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from registry.asgi import request_id_of, trace_id_of
from tests.fakes.server_process import ROOT

TRACE = b"0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize("header_value", ["abc", "4c1b7c5e-7f5c-4f0e-9d2c-0a3c2a6f3f11", "a/b:c+d=_.", "x" * 64])
def test_a_valid_request_id_is_used(header_value: str) -> None:
    """A request id of at most 64 usual characters, which a client or proxy has sent, is used."""
    assert request_id_of([(b"host", b"x"), (b"x-request-id", header_value.encode())]) == header_value


@pytest.mark.parametrize("header_value", [b"", b"x" * 65, b"a b", b"a\x1b[0m", b"a\xe4", b"a;b", b"a\n"])
def test_an_invalid_request_id_is_replaced(header_value: bytes) -> None:
    """A request id that is too long or has other characters is replaced by random hex digits, because request ids are
    written to logs and headers."""
    assert re.fullmatch("[0-9a-f]{16}", request_id_of([(b"x-request-id", header_value)]))


def test_requests_without_an_id_get_one() -> None:
    """Each request without an id gets an id of its own."""
    assert len({request_id_of([]) for _ in range(100)}) == 100


def test_forked_processes_make_different_ids() -> None:
    """Processes that were forked from one process, as the workers are, make different ids."""
    program = (
        "import os; from registry.asgi import request_id_of; request_id_of([]); child = os.fork(); "
        "os.write(1, request_id_of([]).encode() + b' '); child and os.waitpid(child, 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60, check=True)
    assert len(set(done.stdout.split())) == 2


@pytest.mark.parametrize(
    ("header_value", "trace"),
    [
        (b"00-" + TRACE + b"-b7ad6b7169203331-01", TRACE.decode()),
        (b"00-" + TRACE + b"-b7ad6b7169203331-00", TRACE.decode()),
        (b"00-" + b"0" * 32 + b"-b7ad6b7169203331-01", ""),
        (b"00-" + TRACE.upper() + b"-b7ad6b7169203331-01", ""),
        (b"ff-" + TRACE + b"-b7ad6b7169203331-01", ""),
        (TRACE, ""),
    ],
)
def test_trace_ids(header_value: bytes, trace: str) -> None:
    """A valid traceparent gives the trace id. An invalid one counts as missing (W3C Trace Context, 3.2)."""
    assert trace_id_of([(b"traceparent", header_value)]) == trace
