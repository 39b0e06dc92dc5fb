"""Spec, "Pushing blobs": monolithic uploads, uploads in chunks, and cancelled uploads."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

import httpx2
import pytest

from tests.conformance.pusher import (
    MIB,
    Pusher,
    digest_of,
    error_codes,
    make_client,
    new_client,
    statuses_of_all_workers,
    with_query,
)
from tests.fakes.process_resources import eventually, files_below
from tests.fakes.server_process import running_server

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
SIZES = [0, 1, 2, 4096, 2 * MIB + 5]


def pieces(data: bytes, count: int = 3) -> list[bytes]:
    """Splits the data into `count` equal pieces. Bytes that remain become one or more further pieces."""
    step = max(len(data) // count, 1)
    return [data[at : at + step] for at in range(0, len(data), step)]


def stream(data: bytes) -> Iterator[bytes]:
    """Yields a body without a declared length, for chunked transfer coding."""
    yield from pieces(data, 5)


def post_then_put(push: Pusher, data: bytes, digest: str) -> httpx2.Response:
    return push.client.put(with_query(push.start(), digest=digest), content=data)


def post_then_streamed_put(push: Pusher, data: bytes, digest: str) -> httpx2.Response:
    return push.client.put(with_query(push.start(), digest=digest), content=stream(data))


def single_post(push: Pusher, data: bytes, digest: str) -> httpx2.Response:
    return push.client.post(with_query(f"{push.root}/blobs/uploads/", digest=digest), content=data)


def chunks(push: Pusher, data: bytes, digest: str) -> httpx2.Response:
    return push.client.put(with_query(send_chunks(push, pieces(data)), digest=digest))


def declared_chunks(push: Pusher, data: bytes, digest: str) -> httpx2.Response:
    """Declares the digest algorithm at the start of the session."""
    location = send_chunks(push, pieces(data), push.start(**{"digest-algorithm": digest.partition(":")[0]}))
    return push.client.put(with_query(location, digest=digest))


def last_chunk_in_put(push: Pusher, data: bytes, digest: str) -> httpx2.Response:
    *first_pieces, last = pieces(data) or [b""]
    location = send_chunks(push, first_pieces)
    offset = sum(map(len, first_pieces))
    headers = {"Content-Range": f"{offset}-{offset + len(last) - 1}"} if last else {}
    return push.client.put(with_query(location, digest=digest), content=last, headers=headers)


def streamed_patch(push: Pusher, data: bytes, digest: str) -> httpx2.Response:
    answer = push.client.patch(push.start(), content=stream(data))
    assert answer.status_code == 202
    return push.client.put(with_query(answer.headers["location"], digest=digest))


def two_streamed_patches(push: Pusher, data: bytes, digest: str) -> httpx2.Response:
    half, location = len(data) // 2, push.start()
    for piece in (data[:half], data[half:]):
        answer = push.client.patch(location, content=stream(piece))
        assert answer.status_code == 202
        location = answer.headers["location"]
    return push.client.put(with_query(location, digest=digest))


def send_chunks(push: Pusher, data: list[bytes], location: str | None = None) -> str:
    """Sends each chunk on a new connection, so that any worker may receive it. Returns the Location after the last
    chunk. `location`: None: start a new session."""
    location = location or push.start()
    offset = 0
    for piece in data:
        with new_client(push.client) as client:
            answer = client.patch(
                location, content=piece, headers={"Content-Range": f"{offset}-{offset + len(piece) - 1}"}
            )
        offset += len(piece)
        assert answer.status_code == 202
        assert answer.headers["range"] == f"0-{offset - 1}"
        location = answer.headers["location"]
    return location


Form = Callable[[Pusher, bytes, str], httpx2.Response]
FORMS = [
    post_then_put,
    post_then_streamed_put,
    single_post,
    chunks,
    declared_chunks,
    last_chunk_in_put,
    streamed_patch,
    two_streamed_patches,
]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


@forms
@pytest.mark.parametrize("size", SIZES)
def test_every_form(push: Pusher, form: Form, size: int, algorithm: str) -> None:
    """Every form of upload gets 201, with blobs of every size. The blob can be pulled from Location (Pushing blobs)."""
    data = os.urandom(size)
    digest = digest_of(data, algorithm)
    answer = form(push, data, digest)
    assert answer.status_code == 201, answer.text
    assert answer.headers["docker-content-digest"] == digest
    pulled = push.client.get(answer.headers["location"])
    assert pulled.status_code == 200
    assert pulled.content == data
    assert statuses_of_all_workers(push.client, "HEAD", f"{push.root}/blobs/{digest}") == {200}


@forms
def test_a_wrong_digest(push: Pusher, form: Form, algorithm: str) -> None:
    """If the content does not match the declared digest, every form of upload gets 400, and nothing is stored (Pushing
    blobs)."""
    data, claimed = os.urandom(3000), digest_of(b"something else", algorithm)
    answer = form(push, data, claimed)
    assert answer.status_code == 400
    assert error_codes(answer) == ["DIGEST_INVALID"]
    for digest in (claimed, digest_of(data, algorithm)):
        assert push.client.get(f"{push.root}/blobs/{digest}").status_code == 404


@forms
def test_pushing_again(push: Pusher, form: Form) -> None:
    """An existing blob can be pushed again (Pushing blobs)."""
    data = os.urandom(500)
    for _ in range(2):
        assert form(push, data, digest_of(data)).status_code == 201
    assert push.client.get(f"{push.root}/blobs/{digest_of(data)}").content == data


def test_a_session_has_its_own_location(push: Pusher) -> None:
    """POST gets 202 with a Location that contains a new UUID each time (POST then PUT)."""
    found = [UUID.search(push.start()) for _ in range(5)]
    assert all(found)
    assert len({match[0] for match in found if match}) == 5


def test_a_location_stays_on_the_host(push: Pusher) -> None:
    """Locations are relative, because the registry does not know under which host name a client reaches it (POST then
    PUT)."""
    location = push.start()
    assert location.startswith("/v2/")
    assert push.client.put(with_query(location, digest=digest_of(b""))).headers["location"].startswith("/v2/")


def test_an_upload_without_trailing_slash(push: Pusher) -> None:
    """POST to `…/blobs/uploads` also starts an upload, because some clients omit the trailing slash (Endpoints,
    end-4a)."""
    assert push.client.post(f"{push.root}/blobs/uploads").status_code == 202


def test_there_is_no_smallest_chunk(push: Pusher) -> None:
    """The registry accepts chunks of any size, so no header states a minimum (Pushing a blob in chunks)."""
    answer = push.client.post(f"{push.root}/blobs/uploads/")
    assert "oci-chunk-min-length" not in answer.headers
    data = os.urandom(7)
    location = send_chunks(push, [data[at : at + 1] for at in range(7)], answer.headers["location"])
    assert push.client.put(with_query(location, digest=digest_of(data))).status_code == 201


def test_an_unknown_digest_algorithm(push: Pusher) -> None:
    """`digest-algorithm` with an unsupported algorithm gets 400 (Pushing blobs, end-4c)."""
    answer = push.client.post(f"{push.root}/blobs/uploads/?digest-algorithm=md5")
    assert answer.status_code == 400
    assert error_codes(answer) == ["DIGEST_INVALID"]


def test_a_digest_of_another_algorithm_than_declared(push: Pusher) -> None:
    """A session that was started for sha512 can be closed with a sha256 digest. The digest of the closing PUT counts
    (end-4c, end-6)."""
    data = os.urandom(2000)
    location = send_chunks(push, pieces(data), push.start(**{"digest-algorithm": "sha512"}))
    assert push.client.put(with_query(location, digest=digest_of(data))).status_code == 201


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
@pytest.mark.parametrize("at", [0, 50, 101, 5000])
def test_chunks_out_of_order(push: Pusher, method: str, at: int) -> None:
    """A chunk that does not begin at the end of the chunk before gets 416, also in the closing PUT. GET of the session
    returns where to continue (Pushing a blob in chunks)."""
    data = os.urandom(200)
    location = send_chunks(push, [data[:100]])
    target = with_query(location, digest=digest_of(data)) if method == "PUT" else location
    headers = {"Content-Range": f"{at}-{at + 99}"}
    answer = push.client.request(method, target, content=data[100:], headers=headers)
    assert answer.status_code == 416
    error_codes(answer)  # checks the form of the error response
    status = push.client.get(location)
    assert status.status_code == 204
    assert status.headers["range"] == "0-99"
    location = send_patch(push, status.headers["location"], data, 100)
    assert push.client.put(with_query(location, digest=digest_of(data))).status_code == 201
    assert push.client.get(f"{push.root}/blobs/{digest_of(data)}").content == data


def send_patch(push: Pusher, location: str, data: bytes, at: int) -> str:
    headers = {"Content-Range": f"{at}-{len(data) - 1}"}
    answer = push.client.patch(location, content=data[at:], headers=headers)
    assert answer.status_code == 202
    return answer.headers["location"]


def test_the_first_chunk_starts_at_zero(push: Pusher) -> None:
    """A first chunk whose range does not begin with 0 is out of order and gets 416 (Pushing a blob in chunks)."""
    location = push.start()
    answer = push.client.patch(location, content=b"0123456789", headers={"Content-Range": "1-10"})
    assert answer.status_code == 416
    assert push.client.get(location).headers["range"] == "0-0"


@pytest.mark.parametrize(
    "content_range", ["bytes 0-9/10", "bytes=0-9", "0-9/10", "9-0", "-9", "0-", "a-b", "", "0-9,20-29"]
)
def test_a_malformed_content_range(push: Pusher, content_range: str) -> None:
    """A Content-Range that does not match `^[0-9]+-[0-9]+$` gets 400, and nothing is stored (Pushing a blob in
    chunks)."""
    location = push.start()
    answer = push.client.patch(location, content=b"0123456789", headers={"Content-Range": content_range})
    assert answer.status_code == 400
    assert error_codes(answer) == ["BLOB_UPLOAD_INVALID"]
    assert push.client.get(location).headers["range"] == "0-0"


@pytest.mark.parametrize("content_range", ["0-4", "0-19"])
def test_a_content_range_of_another_length(push: Pusher, content_range: str) -> None:
    """A Content-Range whose length differs from Content-Length gets SIZE_INVALID (Pushing a blob in chunks)."""
    location = push.start()
    answer = push.client.patch(location, content=b"0123456789", headers={"Content-Range": content_range})
    assert answer.status_code == 400
    assert error_codes(answer) == ["SIZE_INVALID"]


def test_the_status_of_a_session(push: Pusher) -> None:
    """GET of a session gets 204 with Location and Range from each worker. The Range of a new session is 0-0
    (end-13)."""
    location = push.start()
    answer = push.client.get(location)
    assert answer.status_code == 204
    assert answer.headers["range"] == "0-0"
    assert answer.content == b""
    location = send_chunks(push, [os.urandom(1000)])
    for _ in range(8):  # new connections, so that every worker gets at least one of the requests
        with new_client(push.client) as client:
            answer = client.get(location)
        assert answer.status_code == 204
        assert answer.headers["range"] == "0-999"
        assert answer.headers["location"] == location


def test_a_session_survives_status_requests(push: Pusher) -> None:
    """Status requests do not disturb the upload (end-13)."""
    data = os.urandom(600)
    location = send_chunks(push, [data[:300]])
    for _ in range(5):
        assert push.client.get(location).status_code == 204
    location = send_patch(push, location, data, 300)
    assert push.client.put(with_query(location, digest=digest_of(data))).status_code == 201


@pytest.mark.parametrize("sent", [0, 1000])
def test_cancel(push: Pusher, sent: int) -> None:
    """DELETE of a session gets 204. Then every method and every worker answers 404 for the session (Cancel a blob
    upload)."""
    location = send_chunks(push, [os.urandom(sent)]) if sent else push.start()
    assert push.client.delete(location).status_code == 204
    assert statuses_of_all_workers(push.client, "GET", location) == {404}
    for method in ("PATCH", "PUT", "DELETE", "GET"):
        target = with_query(location, digest=digest_of(b"")) if method == "PUT" else location
        answer = push.client.request(method, target)
        assert answer.status_code == 404
        assert error_codes(answer) == ["BLOB_UPLOAD_UNKNOWN"]


def test_a_closed_session_is_gone(push: Pusher) -> None:
    """After the closing PUT, every worker answers 404 for the session (Pushing a blob in chunks)."""
    location = push.start()
    assert push.client.put(with_query(location, digest=digest_of(b"")), content=b"").status_code == 201
    assert statuses_of_all_workers(push.client, "GET", location) == {404}


@pytest.mark.parametrize("upload", ["00000000-0000-4000-8000-000000000000", "no-uuid", "..", "%2e%2e", "a" * 500])
def test_unknown_sessions(push: Pusher, upload: str) -> None:
    """Requests for a session that was never started get an error for every method (end-5, end-6, end-13, end-14)."""
    url = f"{push.client.base_url}{push.root}/blobs/uploads/{upload}"
    for method in ("GET", "PATCH", "PUT", "DELETE"):
        answer = push.client.request(method, f"{url}?digest={digest_of(b'')}")
        assert answer.status_code in (404, 405)
        error_codes(answer)  # checks the form of the error response


def test_a_session_belongs_to_its_repository(push: Pusher) -> None:
    """A session exists only in the repository in which it was started (POST then PUT)."""
    location = push.start().replace(push.root, f"{push.root}/other")
    assert push.client.get(location).status_code == 404
    assert push.client.put(with_query(location, digest=digest_of(b""))).status_code == 404


def test_a_closing_put_without_digest(push: Pusher) -> None:
    """A closing PUT without a digest gets 400. The session stays and can still be closed."""
    data = os.urandom(10)
    location = send_chunks(push, [data])
    answer = push.client.put(location)
    assert answer.status_code == 400
    assert error_codes(answer) == ["DIGEST_INVALID"]
    assert push.client.put(with_query(location, digest=digest_of(data))).status_code == 201


def test_query_parameters_of_a_location_are_kept(push: Pusher) -> None:
    """Parameters that a client adds to a Location do not disturb the upload (POST then PUT)."""
    data = os.urandom(10)
    location = with_query(push.start(), state="kept")
    assert push.client.patch(location, content=data).status_code == 202
    assert push.client.put(with_query(location, digest=digest_of(data))).status_code == 201


def test_sessions_time_out(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A session without progress for some time is deleted together with its bytes. Status requests do not count as
    progress (Cancel a blob upload)."""
    env = {"ENTREPOT_UPLOADS__EXPIRE": "100ms", "ENTREPOT_GC__INTERVAL": "200ms"}
    with running_server(tmp_path_factory.mktemp("expiry"), env=env) as server:
        with make_client(server.url) as client:
            location = Pusher(client, "expiring").start()
            client.patch(location, content=b"0123456789")
            while (status := client.get(location).status_code) == 204:
                pass
            assert status == 404
        assert eventually(lambda: files_below(server.data / "uploads") == 0)
