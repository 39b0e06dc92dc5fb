"""Upload sessions over HTTP (OCI distribution spec, "Pushing blobs")."""

from __future__ import annotations

from typing import Any

import pytest

from registry.http import DistributionAPI
from storage.content import digest_of
from storage.errors import BlobUploadInvalid
from storage.interface import BlobWriter
from storage.memory_registry import MemoryRegistry
from storage.names import UploadID
from tests.fakes.asgi_client import AsgiAnswer, AsgiClient
from tests.unit.registry.conftest import REPO, V2, put_blob

DATA = b"0123456789" * 100
DIGEST = digest_of(DATA)
UPLOADS = f"{V2}/blobs/uploads/"  # V2 is the path of the repository: /v2/team/app
UNKNOWN_SESSION = f"{UPLOADS}00000000-0000-4000-8000-000000000000"


async def start(client: AsgiClient, query: str = "") -> str:
    """Starts an upload session and returns its Location."""
    answer = await client("POST", UPLOADS + query, {"Content-Length": "0"})
    assert answer.status == 202
    location = answer["location"]
    assert location == UPLOADS + answer["docker-upload-uuid"]
    assert answer["range"] == "0-0"
    assert "oci-chunk-min-length" not in answer
    return location


async def received_range(client: AsgiClient, location: str) -> str:
    """Gets the status of the session. Returns its Range header: the range of the bytes that the registry has."""
    answer = await client("GET", location)
    assert (answer.status, answer["location"]) == (204, location)
    assert location.endswith(answer["docker-upload-uuid"])
    return answer["range"]


async def pull_blob(client: AsgiClient, answer: AsgiAnswer) -> bytes:
    """Gets the blob at the Location of the 201 `answer`, and returns its content."""
    assert answer.status == 201
    pull_answer = await client("GET", answer["location"])
    assert pull_answer.status == 200
    assert pull_answer["docker-content-digest"] == answer["docker-content-digest"]
    return pull_answer.body


async def test_post_then_put(client: AsgiClient) -> None:
    """A POST starts a session, and the closing PUT sends the whole blob."""
    location = await start(client)
    answer = await client("PUT", f"{location}?digest={DIGEST}", body=DATA)
    assert await pull_blob(client, answer) == DATA
    assert (await client("GET", location)).code == "BLOB_UPLOAD_UNKNOWN"


async def test_post_without_the_last_slash(client: AsgiClient) -> None:
    """A POST to `…/blobs/uploads`, without the last slash, starts a session as well."""
    assert (await client("POST", UPLOADS.rstrip("/"))).status == 202


async def test_stream_then_put(client: AsgiClient) -> None:
    """A client can send the blob in a PATCH in chunked transfer coding without Content-Range, and then a PUT without a
    body. Docker does so."""
    location = await start(client)
    answer = await client("PATCH", location, body=[DATA[:7], DATA[7:500], DATA[500:]])
    assert (answer.status, answer["range"], answer["location"]) == (202, f"0-{len(DATA) - 1}", location)
    assert answer["content-length"] == "0"
    answer = await client("PUT", f"{location}?digest={DIGEST}", {"Content-Length": "0"})
    assert await pull_blob(client, answer) == DATA


async def test_chunks_with_content_range(client: AsgiClient) -> None:
    """A client can send the blob in chunks with Content-Range. The closing PUT can have the last chunk."""
    location = await start(client)
    assert (await client("PATCH", location, {"Content-Range": "0-399"}, DATA[:400])).status == 202
    answer = await client("PATCH", location, {"Content-Range": "400-699"}, DATA[400:700])
    assert answer["range"] == "0-699"
    answer = await client("PUT", f"{location}?digest={DIGEST}", {"Content-Range": "700-999"}, DATA[700:])
    assert await pull_blob(client, answer) == DATA


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
@pytest.mark.parametrize("content_range", ["0-9", "300-309", "500-509"])
async def test_a_chunk_out_of_order_is_416_and_changes_nothing(
    client: AsgiClient, method: str, content_range: str
) -> None:
    """A chunk with a wrong offset gets 416, and the response says where to continue. The session stays usable."""
    location = await start(client)
    await client("PATCH", location, body=DATA[:400])
    answer = await client(method, f"{location}?digest={DIGEST}", {"Content-Range": content_range}, DATA[:10])
    assert (answer.status, answer.code) == (416, "BLOB_UPLOAD_INVALID")
    assert (answer["range"], answer["location"]) == ("0-399", location)
    assert await received_range(client, location) == "0-399"
    answer = await client("PUT", f"{location}?digest={DIGEST}", {"Content-Range": "400-999"}, DATA[400:])
    assert await pull_blob(client, answer) == DATA


@pytest.mark.parametrize(
    "content_range", ["bytes 0-9/10", "0-", "-9", "a-b", "0-9,10-19", "9-0", "0-9/10", " ", "0-" + "9" * 30]
)
async def test_a_bad_content_range_is_400(client: AsgiClient, content_range: str) -> None:
    """A Content-Range that is not of the form `first-last` gets 400, and the session does not change."""
    location = await start(client)
    answer = await client("PATCH", location, {"Content-Range": content_range}, DATA[:10])
    assert (answer.status, answer.code) == (400, "BLOB_UPLOAD_INVALID")
    assert await received_range(client, location) == "0-0"


async def test_two_content_ranges_are_400(client: AsgiClient) -> None:
    """Two Content-Range headers get 400, even if they are equal."""
    location = await start(client)
    answer = await client("PATCH", location, [("Content-Range", "0-9"), ("Content-Range", "0-9")], DATA[:10])
    assert answer.code == "BLOB_UPLOAD_INVALID"


async def test_a_declared_length_that_differs_is_refused_before_reading(client: AsgiClient) -> None:
    """If Content-Range and Content-Length differ, the request gets 400 SIZE_INVALID, and nothing is stored."""
    location = await start(client)
    answer = await client("PATCH", location, {"Content-Range": "0-99"}, DATA[:50])
    assert (answer.status, answer.code) == (400, "SIZE_INVALID")
    assert await received_range(client, location) == "0-0"


@pytest.mark.parametrize(("sent", "stored_range"), [(DATA[:50], "0-49"), (DATA[:150], "0-99")], ids=["short", "long"])
async def test_the_status_is_right_after_a_body_of_wrong_length(
    client: AsgiClient, sent: bytes, stored_range: str
) -> None:
    """In chunked transfer coding, a wrong length shows only at the end. The session then has at most the bytes that
    Content-Range declared, and its status says how many."""
    location = await start(client)
    answer = await client("PATCH", location, {"Content-Range": "0-99"}, [sent[:30], sent[30:]])
    assert (answer.status, answer.code) == (400, "SIZE_INVALID")
    assert await received_range(client, location) == stored_range


async def test_a_session_can_be_resumed_after_a_disconnect(client: AsgiClient) -> None:
    """If the client disconnects, the session keeps the received bytes and can be resumed."""
    location = await start(client)
    answer = await client("PATCH", location, {"Content-Length": "1000"}, DATA[:300], leaves=True)
    assert answer.status == 0
    assert await received_range(client, location) == "0-299"
    answer = await client("PUT", f"{location}?digest={DIGEST}", {"Content-Range": "300-999"}, DATA[300:])
    assert await pull_blob(client, answer) == DATA


async def test_a_disconnect_in_the_closing_put_commits_nothing(client: AsgiClient) -> None:
    """If the client disconnects in the closing PUT, no blob is stored, and the session stays."""
    location = await start(client)
    url = f"{location}?digest={digest_of(DATA[:300])}"
    assert (await client("PUT", url, {"Content-Length": "1000"}, DATA[:300], leaves=True)).status == 0
    assert (await client("HEAD", f"{V2}/blobs/{digest_of(DATA[:300])}")).status == 404
    assert await received_range(client, location) == "0-299"


@pytest.mark.parametrize(
    "query", ["", "?digest=", "?digest=sha256:short", "?digest=md5:aa", f"?digest={DIGEST}&digest={DIGEST}"]
)
async def test_a_closing_put_needs_one_valid_digest(client: AsgiClient, query: str) -> None:
    """A closing PUT without exactly one valid digest gets 400 DIGEST_INVALID before its body is read. The session does
    not change."""
    location = await start(client)
    answer = await client("PUT", location + query, body=DATA)
    assert (answer.status, answer.code) == (400, "DIGEST_INVALID")
    assert await received_range(client, location) == "0-0"


async def test_a_wrong_digest_is_400_in_every_form(client: AsgiClient) -> None:
    """A blob with a wrong digest gets 400 and is not stored, whether it comes by POST and PUT, by PATCH and PUT, or by
    a single POST."""
    wrong_digest = digest_of(b"something else")
    first, second = await start(client), await start(client)
    await client("PATCH", second, body=DATA)
    for answer in (
        await client("PUT", f"{first}?digest={wrong_digest}", body=DATA),
        await client("PUT", f"{second}?digest={wrong_digest}"),
        await client("POST", f"{UPLOADS}?digest={wrong_digest}", body=DATA),
    ):
        assert (answer.status, answer.code) == (400, "DIGEST_INVALID")
    assert (await client("HEAD", f"{V2}/blobs/{wrong_digest}")).status == 404
    assert (await client("HEAD", f"{V2}/blobs/{DIGEST}")).status == 404


@pytest.mark.parametrize("data", [b"", DATA], ids=["empty", "some"])
@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_single_post(client: AsgiClient, data: bytes, algorithm: str) -> None:
    """A single POST with the whole blob gets 201."""
    digest = digest_of(data, algorithm)
    answer = await client("POST", f"{UPLOADS}?digest={digest}", {"Content-Length": str(len(data))}, data)
    assert await pull_blob(client, answer) == data
    assert answer["docker-content-digest"] == digest


async def test_a_disconnect_in_a_single_post_leaves_no_session(client: AsgiClient, registry: MemoryRegistry) -> None:
    """If the client disconnects in a single POST, the session is cancelled. The client has not received the session's
    id, so it could not resume the session."""
    url = f"{UPLOADS}?digest={DIGEST}"
    assert (await client("POST", url, {"Content-Length": "1000"}, DATA[:300], leaves=True)).status == 0
    assert not registry._uploads


async def test_digest_algorithm(client: AsgiClient) -> None:
    """A session can be started for sha512. The closing PUT may name any algorithm."""
    for query in ("?digest-algorithm=sha512", "?digest-algorithm=sha256", ""):
        location = await start(client, query)
        await client("PATCH", location, body=DATA)
        answer = await client("PUT", f"{location}?digest={digest_of(DATA, 'sha512')}")
        assert await pull_blob(client, answer) == DATA


@pytest.mark.parametrize(
    "query",
    [
        "?digest-algorithm=md5",
        "?digest-algorithm=",
        f"?digest-algorithm=sha512&digest={DIGEST}",
        "?mount=x",
        "?digest=x",
    ],
)
async def test_an_invalid_post_is_400(client: AsgiClient, query: str) -> None:
    """A POST gets 400 if it names an unknown algorithm, an invalid digest, or an algorithm that is not the digest's."""
    answer = await client("POST", UPLOADS + query)
    assert (answer.status, answer.code) == (400, "DIGEST_INVALID")


async def test_mount(client: AsgiClient, registry: MemoryRegistry) -> None:
    """A mount gets 201, with and without `from`, and the repository then has the blob."""
    for data, query in ((DATA, "&from=other/app"), (b"second", ""), (b"third", "&from=")):
        digest = await put_blob(registry, data, "other/app")
        assert (await client("GET", f"{V2}/blobs/{digest}")).status == 404
        answer = await client("POST", f"{UPLOADS}?mount={digest}{query}")
        assert await pull_blob(client, answer) == data
        assert answer["docker-content-digest"] == digest


async def test_a_mount_that_fails_starts_a_session(client: AsgiClient, registry: MemoryRegistry) -> None:
    """If the blob cannot be mounted, the response is 202 with a session. The test tries a source without the blob, an
    unknown source, and a blob that no repository has."""
    await put_blob(registry, b"x", "other/app")
    for query in ("&from=other/app", "&from=never/heard", ""):
        location = await start(client, f"?mount={DIGEST}{query}")
        assert await received_range(client, location) == "0-0"


async def test_a_mount_from_a_bad_name_is_400(client: AsgiClient) -> None:
    """A mount from an invalid name gets 400."""
    answer = await client("POST", f"{UPLOADS}?mount={DIGEST}&from=../etc")
    assert (answer.status, answer.code) == (400, "NAME_INVALID")


async def test_cancel(client: AsgiClient) -> None:
    """A DELETE of a session gets 204, and every later request for the session gets 404."""
    location = await start(client)
    await client("PATCH", location, body=DATA)
    assert (await client("DELETE", location)).status == 204
    for method in ("GET", "PATCH", "PUT", "DELETE"):
        answer = await client(method, f"{location}?digest={DIGEST}")
        assert (answer.status, answer.code) == (404, "BLOB_UPLOAD_UNKNOWN")


async def test_a_cancel_that_loses_the_session_tries_again(
    client: AsgiClient, registry: MemoryRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another request takes the session over while a DELETE resumes it, the DELETE resumes it again. After five
    attempts, the client gets the error."""
    location, resume_upload, attempts = await start(client), registry.resume_upload, 0
    lost_attempts = 5

    async def resume_or_lose(*args: Any, **kwargs: Any) -> BlobWriter:
        nonlocal attempts
        attempts += 1
        if attempts <= lost_attempts:
            raise BlobUploadInvalid("a newer request has taken this upload over")
        return await resume_upload(*args, **kwargs)

    monkeypatch.setattr(registry, "resume_upload", resume_or_lose)
    assert (await client("DELETE", location)).code == "BLOB_UPLOAD_INVALID"
    lost_attempts = 7
    assert (await client("DELETE", location)).status == 204
    assert attempts == 8


async def test_a_session_belongs_to_its_repository(client: AsgiClient) -> None:
    """The id of a session is unknown in every other repository."""
    location = (await start(client)).replace(REPO, "other/app")
    for method in ("GET", "PATCH", "PUT", "DELETE"):
        assert (await client(method, f"{location}?digest={DIGEST}", body=b"")).status == 404


async def test_an_unknown_session_is_404_before_the_body(client: AsgiClient) -> None:
    """A request for an unknown session gets 404 before its body is read."""
    for method in ("PATCH", "PUT"):
        assert (await client(method, f"{UNKNOWN_SESSION}?digest={DIGEST}", body=DATA)).code == "BLOB_UPLOAD_UNKNOWN"


async def test_a_newer_request_takes_over_the_session(client: AsgiClient, registry: MemoryRegistry) -> None:
    """A newer request takes a session over. The older request gets an error, and the bytes of the newer one are
    stored."""
    location = await start(client)
    older = await registry.resume_upload(REPO, UploadID(location.rpartition("/")[2]))
    assert (await client("PATCH", location, body=DATA)).status == 202
    with pytest.raises(Exception, match="newer request"):
        await older.write(b"late")


async def test_public_url_goes_before_every_location(registry: MemoryRegistry) -> None:
    """With `public_url`, every Location is a URL below it."""
    client = AsgiClient(DistributionAPI(registry, public_url="https://registry.example.com/"))
    answer = await client("POST", UPLOADS)
    assert answer["location"].startswith(f"https://registry.example.com{UPLOADS}")
    answer = await client("POST", f"{UPLOADS}?digest={DIGEST}", body=DATA)
    assert answer["location"] == f"https://registry.example.com{V2}/blobs/{DIGEST}"
