"""The HTTP status and body of each error. No response contains the cause of an internal error."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from typing import TypeVar

import pytest

from registry.http import DistributionAPI
from registry.http.api import HANDLERS
from registry.http.error_statuses import STATUS_BY_ERROR, status_of
from registry.http.query import MAX_PARAMETERS
from storage import errors
from storage.content import BLOB_TYPE, Descriptor, OpenFile, Span
from storage.errors import RegistryError
from storage.interface import BlobReader
from storage.names import Digest, RepositoryName
from storage.wrappers import Call, RefusingRegistry
from tests.fakes.asgi_client import AsgiClient
from tests.unit.registry.conftest import V2

DIGEST = "sha256:" + "a" * 64
CODES = {
    *("BLOB_UNKNOWN", "BLOB_UPLOAD_INVALID", "BLOB_UPLOAD_UNKNOWN", "DIGEST_INVALID", "MANIFEST_BLOB_UNKNOWN"),
    *("MANIFEST_INVALID", "MANIFEST_UNKNOWN", "NAME_INVALID", "NAME_UNKNOWN", "SIZE_INVALID", "UNAUTHORIZED"),
    *("DENIED", "UNSUPPORTED", "TOOMANYREQUESTS"),
}
"""The error codes in the OCI distribution spec, "Error Codes"."""


def class_and_subclasses(kind: type[RegistryError]) -> Iterator[type[RegistryError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from class_and_subclasses(child)


def product_errors() -> list[type[RegistryError]]:
    """Returns the error classes of the product that can reach an HTTP client. Leaves out the classes that other tests
    define, and the errors that only the mirror sees."""
    classes = [
        kind
        for kind in class_and_subclasses(RegistryError)
        if kind.__module__.partition(".")[0] in ("storage", "registry")
    ]
    return [kind for kind in classes if kind.__module__ != "registry.mirror.upstream_client"]


T = TypeVar("T")


class FailingRegistry(RefusingRegistry):
    """A registry that raises the same error for every call."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def handle(self, call: Call[T]) -> T:
        raise self.error


class BrokenReader:
    """A reader for a blob of 10 bytes. Reading fails after 4 bytes."""

    def __init__(self, error: Exception) -> None:
        self.descriptor = Descriptor(BLOB_TYPE, Digest(DIGEST), 10)
        self.span = (0, 10)
        self.file: OpenFile | None = None
        self.location: str | None = None
        self.is_incomplete = False
        self.data: bytes | None = None
        self.error = error
        self.closed = False

    async def readable_until(self, at: int) -> int:
        raise self.error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"half"
        raise self.error

    async def aclose(self) -> None:
        self.closed = True


class BrokenBlobRegistry(RefusingRegistry):
    """A registry that returns a `BrokenReader` for every blob."""

    def __init__(self, reader: BrokenReader) -> None:
        self.reader = reader

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        return self.reader


def test_every_error_has_a_status() -> None:
    """Each error class has an entry of its own in `STATUS_BY_ERROR`."""
    assert set(product_errors()) <= STATUS_BY_ERROR.keys()


def test_an_error_with_a_client_status_has_a_code_of_the_spec() -> None:
    """An error code that is not in the spec has a status of 500 or more, or is only used outside `/v2`."""
    outside_v2 = ("storage.access", "storage.jobs", "storage.backups", "storage.imports", "storage.upstream_tags")
    distribution = [kind for kind in product_errors() if kind.__module__ not in outside_v2]
    assert {kind.code for kind in distribution if STATUS_BY_ERROR[kind] < 500} <= CODES


def test_a_new_subclass_has_the_status_of_its_base() -> None:
    """An error class without an entry in `STATUS_BY_ERROR` has the status of its base class."""

    class NewError(errors.ManifestUnknown):
        pass

    assert status_of(NewError()) == 404


@pytest.mark.parametrize("kind", product_errors(), ids=lambda kind: kind.__name__)
async def test_every_error_has_the_json_format_of_the_spec(kind: type[RegistryError]) -> None:
    """For each error that a registry raises, the response has the error's status, and its code in the JSON format of
    the spec."""
    answer = await AsgiClient(DistributionAPI(FailingRegistry(kind("what went wrong"))))("GET", f"{V2}/manifests/1")
    assert (answer.status, answer.code) == (STATUS_BY_ERROR[kind], kind.code)
    assert answer.json["errors"][0]["message"] == "what went wrong"
    assert answer["cache-control"] == "no-store"


async def test_too_many_requests_has_retry_after() -> None:
    """429 carries Retry-After in seconds (RFC 9110, 10.2.3)."""
    error = errors.TooManyRequests(retry_after=7)
    answer = await AsgiClient(DistributionAPI(FailingRegistry(error)))("GET", f"{V2}/manifests/1")
    assert (answer.status, answer["retry-after"]) == (429, "7")


async def test_an_unexpected_failure_is_500_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The response to an unexpected exception has only the request id. The log has the traceback once, with the same
    id."""
    with caplog.at_level(logging.ERROR):
        answer = await AsgiClient(DistributionAPI(FailingRegistry(ValueError("secret"))))("GET", f"{V2}/manifests/1")
    assert (answer.status, answer.code) == (500, "UNKNOWN")
    assert b"secret" not in answer.body
    assert b"Traceback" not in answer.body
    (record,) = caplog.records
    assert answer["x-request-id"] in record.getMessage()
    assert record.exc_info


@pytest.mark.parametrize(("cause", "unexpected"), [(OSError("the disk"), False), (ValueError("a bug"), True)])
async def test_a_storage_failure_is_logged_with_its_cause(
    cause: Exception, unexpected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """StorageFailed gets 500. If an error of the operating system caused it, the log has this error in one line. For
    any other cause, the log has a traceback."""
    error = errors.StorageFailed()
    error.__cause__ = cause
    with caplog.at_level(logging.ERROR):
        answer = await AsgiClient(DistributionAPI(FailingRegistry(error)))("GET", f"{V2}/manifests/1")
    assert (answer.status, answer.code) == (500, "STORAGE_FAILED")
    (record,) = caplog.records
    assert bool(record.exc_info) == unexpected
    assert unexpected or "the disk" in record.getMessage()


async def test_upstream_errors_have_retry_after() -> None:
    """Responses with 502 and 504 have Retry-After if it is known when the upstream can be tried again."""
    for kind in (errors.UpstreamUnavailable, errors.UpstreamTimeout):
        for error, retry_after in ((kind(retry_after=3), ["3"]), (kind(), [])):
            answer = await AsgiClient(DistributionAPI(FailingRegistry(error)))("GET", f"{V2}/manifests/1")
            assert answer.all("retry-after") == retry_after


@pytest.mark.parametrize("error", [OSError("disk"), errors.StorageFailed()], ids=["unexpected", "expected"])
async def test_the_response_is_cut_off_if_reading_the_blob_fails(error: Exception) -> None:
    """If reading a blob fails, the response ends before its Content-Length, and the reader is closed."""
    reader = BrokenReader(error)
    answer = await AsgiClient(DistributionAPI(BrokenBlobRegistry(reader)))("GET", f"{V2}/blobs/{DIGEST}")
    assert answer.cut is error
    assert (answer.status, answer.body, answer.whole) == (200, b"half", False)
    assert reader.closed


@pytest.mark.parametrize(
    "path",
    [
        *("/v2/_catalog/", "/v2/x", "/v2/team/app", "/v2/team/app/", "/v2/team/app/tags", "/v2/team/app/tags/list/x"),
        *("/v2/_oci/ext", "/v2/team/_oci/manifests/1", "/v2/team/app/_oci/x/y", "/v2/team/app/tags/lists", "/v2//"),
    ],
)
async def test_an_unknown_path_is_404(client: AsgiClient, path: str) -> None:
    """Unknown paths and unknown extensions of the API get 404 in the format of the spec."""
    answer = await client("GET", path)
    assert (answer.status, answer.code) == (404, "UNSUPPORTED")


@pytest.mark.parametrize(
    "path",
    [
        *("/v2/UPPER/manifests/1", "/v2//manifests/1", "/v2/manifests/1", "/v2/a//b/manifests/1", "/v2/tags/list"),
        *("/v2/a/../b/manifests/1", "/v2/a/..%2fb/manifests/1", "/v2/a%2Fb/tags/list", "/v2/%2e%2e/a/tags/list"),
        *("/v2/a%00/tags/list", "/v2/a%zz/tags/list", "/v2/a%/tags/list", "/v2/a%ff/tags/list", "/v2/%C3%A9/tags/list"),
        *("/v2/" + "a" * 256 + "/tags/list", "/v2/a/manifests/x%2fy", "/v2/blobs/uploads/", "/v2/.hidden/tags/list"),
    ],
)
async def test_an_invalid_name_is_400(client: AsgiClient, path: str) -> None:
    """Paths with invalid repository names get 400. Dots, percent escapes or a large length do not make them valid."""
    method = "POST" if path.endswith("uploads/") else "GET"
    answer = await client(method, path)
    assert (answer.status, answer.code) == (400, "NAME_INVALID")


async def test_raw_bytes_in_the_path_are_400(client: AsgiClient) -> None:
    """A path with unescaped bytes outside ASCII gets 400, whether or not the bytes are UTF-8."""
    for raw in (b"/v2/\xff/tags/list", b"/v2/\xc3\xa9/tags/list", b"/v2/a\0/tags/list"):
        assert (await client("GET", raw)).code == "NAME_INVALID"


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        (f"{V2}/manifests/.bad", 400, "MANIFEST_INVALID"),
        (f"{V2}/manifests/" + "t" * 129, 400, "MANIFEST_INVALID"),
        (f"{V2}/manifests/", 400, "MANIFEST_INVALID"),
        (f"{V2}/manifests/sha256:short", 400, "DIGEST_INVALID"),
        (f"{V2}/manifests/md5:{'a' * 32}", 400, "DIGEST_INVALID"),
        (f"{V2}/blobs/{DIGEST.upper()}", 400, "DIGEST_INVALID"),
        (f"{V2}/referrers/latest", 400, "DIGEST_INVALID"),
        (f"{V2}/blobs/uploads/not-a-uuid", 404, "BLOB_UPLOAD_UNKNOWN"),
        (f"{V2}/blobs/{DIGEST}", 404, "BLOB_UNKNOWN"),
        (f"{V2}/manifests/latest", 404, "MANIFEST_UNKNOWN"),
        (f"{V2}/manifests/{DIGEST}", 404, "MANIFEST_UNKNOWN"),
        (f"{V2}/tags/list", 404, "NAME_UNKNOWN"),
        ("/v2/_catalog?n=%zz", 400, "UNSUPPORTED"),
        ("/v2/_catalog?n=1&n=2", 400, "UNSUPPORTED"),
        ("/v2/_catalog?last=%ff", 400, "UNSUPPORTED"),
        ("/v2/?x=%00", 400, "UNSUPPORTED"),
    ],
)
async def test_invalid_input_has_the_error_code_for_its_kind(
    client: AsgiClient, path: str, status: int, code: str
) -> None:
    """Invalid references, digests, ids and queries have the error code for their kind."""
    answer = await client("GET", path)
    assert (answer.status, answer.code) == (status, code)


PATHS = {
    "ping": "/v2/",
    "catalog": "/v2/_catalog",
    "extensions": "/v2/_oci/ext/discover",
    "tags": f"{V2}/tags/list",
    "referrers": f"{V2}/referrers/{DIGEST}",
    "manifests": f"{V2}/manifests/1",
    "blobs": f"{V2}/blobs/{DIGEST}",
    "uploads": f"{V2}/blobs/uploads/",
    "session": f"{V2}/blobs/uploads/00000000-0000-4000-8000-000000000000",
}


@pytest.mark.parametrize("kind", HANDLERS)
async def test_an_unknown_method_is_405_with_allow(client: AsgiClient, kind: str) -> None:
    """An unknown method gets 405. The Allow header lists the methods of the path, as in the response to OPTIONS (RFC
    9110, 15.5.6)."""
    answer = await client("BREW", PATHS[kind])
    assert (answer.status, answer.code) == (405, "UNSUPPORTED")
    allowed = await client("OPTIONS", PATHS[kind])
    assert allowed.status == 204
    assert answer["allow"] == allowed["allow"] == ", ".join((*HANDLERS[kind], "OPTIONS"))


async def test_head_of_an_error_has_no_body(client: AsgiClient) -> None:
    """If a HEAD fails, its response has the Content-Length of the GET's error, and no body."""
    get_answer, head_answer = await client("GET", f"{V2}/manifests/1"), await client("HEAD", f"{V2}/manifests/1")
    assert head_answer.status == get_answer.status == 404
    assert head_answer["content-length"] == get_answer["content-length"] == str(len(get_answer.body))
    assert (get_answer.code, head_answer.body) == ("MANIFEST_UNKNOWN", b"")


async def test_every_answer_has_its_own_request_id(client: AsgiClient) -> None:
    """Each response has a request id of its own, also if it is an error."""
    paths = ["/v2/", f"{V2}/manifests/1", "/v2/unknown"] * 10
    assert len({(await client("GET", path))["x-request-id"] for path in paths}) == len(paths)


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_ping(client: AsgiClient, path: str, method: str) -> None:
    """`/v2/` answers 200 with `{}` (endpoint end-1 of the spec), and so does `/v2`."""
    answer = await client(method, path)
    assert (answer.status, answer["content-length"], answer["content-type"]) == (200, "2", "application/json")
    assert answer.body == (b"{}" if method == "GET" else b"")


async def test_a_query_with_too_many_parameters(client: AsgiClient) -> None:
    """A query with `MAX_PARAMETERS` parameters is accepted. A query with one more is refused, because parsing very many
    parameters would block the event loop."""
    at_limit = "&".join(f"a{number}=" for number in range(MAX_PARAMETERS))
    assert (await client("GET", f"/v2/?{at_limit}")).status == 200
    refused = await client("GET", f"/v2/?{at_limit}&a=")
    assert (refused.status, refused.code) == (400, "UNSUPPORTED")
