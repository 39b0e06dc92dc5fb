"""Spec, "Error Codes" and "Warnings"."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

from tests.conformance.pusher import (
    OCI_LAYER,
    OCI_MANIFEST,
    Pusher,
    describe,
    digest_of,
    encode,
    error_codes,
    with_query,
)
from tests.fakes.mirror_site import REPO, MirrorSite

MISSING = digest_of(b"never pushed")
WARNING = re.compile(r'299 - "(?:[^"\\]|\\.)*"')

Cause = Callable[[Pusher], httpx2.Response]
# For each error: the expected status, the expected code, and a function that causes the error.
CAUSES: dict[str, tuple[int, str, Cause]] = {
    "unknown blob": (404, "BLOB_UNKNOWN", lambda p: p.client.get(f"{p.root}/blobs/{MISSING}")),
    "malformed chunk": (
        400,
        "BLOB_UPLOAD_INVALID",
        lambda p: p.client.patch(p.start(), content=b"x", headers={"Content-Range": "bytes 0-0/1"}),
    ),
    "chunk out of order": (
        416,
        "BLOB_UPLOAD_INVALID",
        lambda p: p.client.patch(p.start(), content=b"x", headers={"Content-Range": "5-5"}),
    ),
    "unknown session": (
        404,
        "BLOB_UPLOAD_UNKNOWN",
        lambda p: p.client.get(f"{p.root}/blobs/uploads/00000000-0000-4000-8000-000000000000"),
    ),
    "wrong digest": (
        400,
        "DIGEST_INVALID",
        lambda p: p.client.put(with_query(p.start(), digest=MISSING), content=b"x"),
    ),
    "missing layer": (
        404,
        "MANIFEST_BLOB_UNKNOWN",
        lambda p: p.client.put(
            f"{p.root}/manifests/x",
            content=encode(p.artifact(layers=[describe(b"never pushed", OCI_LAYER)])),
            headers={"Content-Type": OCI_MANIFEST},
        ),
    ),
    "no manifest": (400, "MANIFEST_INVALID", lambda p: p.client.put(f"{p.root}/manifests/x", content=b"no JSON")),
    "bad tag": (400, "MANIFEST_INVALID", lambda p: p.client.get(f"{p.root}/manifests/-x")),
    "large manifest": (
        413,
        "MANIFEST_INVALID",
        lambda p: p.client.put(f"{p.root}/manifests/x", content=bytes(8 * 1024 * 1024 + 1)),
    ),
    "unknown manifest": (404, "MANIFEST_UNKNOWN", lambda p: p.client.get(f"{p.root}/manifests/{MISSING}")),
    "bad name": (400, "NAME_INVALID", lambda p: p.client.get("/v2/Upper/manifests/x")),
    "unknown name": (404, "NAME_UNKNOWN", lambda p: p.client.get(f"{p.root}/tags/list")),
    "wrong size": (
        400,
        "SIZE_INVALID",
        lambda p: p.client.patch(p.start(), content=b"x", headers={"Content-Range": "0-7"}),
    ),
    "wrong method": (405, "UNSUPPORTED", lambda p: p.client.put("/v2/")),
    "unknown path": (404, "UNSUPPORTED", lambda p: p.client.get("/v2/x")),
    "unreadable query": (400, "UNSUPPORTED", lambda p: p.client.get(f"{p.client.base_url}/v2/_catalog?n=%zz")),
    "outside /v2": (404, "UNSUPPORTED", lambda p: p.client.get("/somewhere/else")),
    # This 405 comes from the web framework. The registry gives the response the form of the spec.
    "framework's own method error": (405, "UNSUPPORTED", lambda p: p.client.post("/health/live")),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_error_codes(push: Pusher, cause: str) -> None:
    """Each error response has the expected status, the JSON form of the spec, a code of the spec, and a message (Error
    Codes)."""
    status, code, run = CAUSES[cause]
    answer = run(push)
    assert answer.status_code == status
    assert error_codes(answer) == [code]
    assert re.fullmatch("[A-Z_]+", code)


def test_errors_must_not_be_cached(push: Pusher) -> None:
    """An error response forbids caches to store it, because missing content may be pushed a moment later (RFC 9111,
    5.2.2.5)."""
    for cause in ("unknown blob", "unknown manifest", "unknown name", "bad name"):
        assert CAUSES[cause][2](push).headers["cache-control"] == "no-store"


def test_errors_keep_the_connection(push: Pusher) -> None:
    """An error response does not close the connection (RFC 9112, 9.3)."""
    push.tag("there")
    for cause in ("unknown blob", "unknown manifest", "unknown session", "bad name", "wrong method"):
        answer = CAUSES[cause][2](push)
        assert "close" not in answer.headers.get("connection", "")
        assert push.client.get(f"{push.root}/manifests/there").status_code == 200


def test_messages_do_not_echo_control_characters(push: Pusher) -> None:
    """Control characters that a client sent do not appear in the error message, and they add no header to the response
    (Error Codes)."""
    answer = push.client.get(f"{push.client.base_url}{push.root}/manifests/%1b%5b31m%0d%0aX-Evil:%201")
    assert answer.status_code == 400
    assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f-\xff]", answer.content)
    assert "x-evil" not in answer.headers


def test_warnings(tmp_path: Path) -> None:
    """A mirror whose upstream cannot be reached warns that its manifests by tag and its lists may be out of date. These
    responses have one Warning header. It has the form `299 - "text"` without a date, and at most 4096 bytes."""
    with ExitStack() as stack:
        site = MirrorSite(tmp_path, stack).start(1000, settings='tag_ttl = "0s"')
        assert "warning" not in site.get_manifest().headers
        site.hub.refuse()
        for path in ("manifests/1", "tags/list", f"referrers/{site.image.digest}"):
            answer = site.http.get(f"/v2/{REPO}/{path}")
            warnings = answer.headers.get_list("warning")
            assert (answer.status_code, len(warnings)) == (200, 1)
            assert WARNING.fullmatch(warnings[0]), warnings
            assert len(warnings[0]) <= 4096
