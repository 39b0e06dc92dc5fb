"""Spec, "Determining Support": the API base `/v2/`, the header that every response has, and unknown paths."""

from __future__ import annotations

import httpx2
import pytest

from tests.conformance.pusher import Pusher, error_codes


@pytest.mark.parametrize("path", ["/v2/", "/v2"])
def test_the_api_base_gets_200(client: httpx2.Client, path: str) -> None:
    """GET /v2/ gets 200 (end-1)."""
    assert client.get(path).status_code == 200
    assert client.head(path).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/v2/", "/v2/_catalog", "/v2/none/tags/list", "/v2/none/manifests/x", "/v2/A/manifests/x", "/v2/x", "/nowhere"],
)
def test_every_answer_names_the_api_version(client: httpx2.Client, path: str) -> None:
    """Every response has `Docker-Distribution-Api-Version: registry/2.0` (Legacy Docker support HTTP headers)."""
    assert client.get(path).headers["docker-distribution-api-version"] == "registry/2.0"


@pytest.mark.parametrize(
    "path",
    [
        "/v2/_oci/ext/other",
        "/v2/_chainguard/x/y",
        "/v2/_docker/x",
        "/v2/a/b/_oci/ext/discover",
        "/v2/a/_x/tags/list",
    ],
)
def test_extensions_are_not_repositories(client: httpx2.Client, path: str) -> None:
    """A path with a component that starts with `_` is reserved for extensions. If the extension is unknown, the
    response is 404 (Endpoints)."""
    answer = client.get(path)
    assert answer.status_code == 404
    error_codes(answer)  # checks the form of the error response


def test_unknown_paths_are_not_found(push: Pusher) -> None:
    """A path that is no endpoint gets 404 with an error document (Endpoints)."""
    for path in ("/v2/a", "/v2/a/b", f"{push.root}/tags", f"{push.root}/tags/other", f"{push.root}/blob/x"):
        answer = push.client.get(path)
        assert answer.status_code == 404, path
        assert error_codes(answer) == ["UNSUPPORTED"]


@pytest.mark.parametrize(
    ("method", "endpoint", "allowed"),
    [
        ("POST", "manifests/x", "GET, HEAD, PUT, DELETE, OPTIONS"),
        ("PUT", "blobs/sha256:" + "0" * 64, "GET, HEAD, DELETE, OPTIONS"),
        ("DELETE", "tags/list", "GET, HEAD, OPTIONS"),
        ("GET", "blobs/uploads/", "POST, OPTIONS"),
        ("PATCH", "referrers/sha256:" + "0" * 64, "GET, HEAD, OPTIONS"),
    ],
)
def test_other_methods_are_not_allowed(push: Pusher, method: str, endpoint: str, allowed: str) -> None:
    """A method that an endpoint does not support gets 405. Allow lists the supported methods (RFC 9110, 15.5.6)."""
    answer = push.client.request(method, f"{push.root}/{endpoint}")
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed
    assert error_codes(answer) == ["UNSUPPORTED"]
