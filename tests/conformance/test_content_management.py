"""Spec, "Content Management": deleting tags, manifests, blobs."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from tests.conformance.pusher import (
    OCI_MANIFEST,
    Pusher,
    describe,
    digest_of,
    encode,
    error_codes,
    make_client,
    statuses_of_all_workers,
)
from tests.fakes.server_process import running_server


def test_deleting_tags(push: Pusher) -> None:
    """DELETE of a tag gets 202. Then every worker answers 404 for the tag. The manifest stays (end-9)."""
    body = push.tag("one", "two")
    assert push.client.delete(f"{push.root}/manifests/one").status_code == 202
    assert statuses_of_all_workers(push.client, "GET", f"{push.root}/manifests/one") == {404}
    for reference in ("two", digest_of(body)):
        assert push.client.get(f"{push.root}/manifests/{reference}").content == body
    assert push.client.get(f"{push.root}/tags/list").json()["tags"] == ["two"]


def test_deleting_manifests(push: Pusher, algorithm: str) -> None:
    """DELETE of a digest gets 202. Then every worker answers 404 for the digest and for the tags that pointed at it
    (end-9)."""
    body = encode(push.image())
    digest = digest_of(body, algorithm)
    path = f"{push.root}/manifests/{digest}?tag=one&tag=two"
    assert push.client.put(path, content=body, headers={"Content-Type": OCI_MANIFEST}).status_code == 201
    other = push.tag("other")
    assert push.client.delete(f"{push.root}/manifests/{digest}").status_code == 202
    for reference in (digest, "one", "two"):
        for method in ("GET", "HEAD"):
            assert statuses_of_all_workers(push.client, method, f"{push.root}/manifests/{reference}") == {404}
    assert push.client.get(f"{push.root}/tags/list").json()["tags"] == ["other"]
    assert push.client.get(f"{push.root}/manifests/other").content == other


def test_deleting_blobs(push: Pusher, algorithm: str) -> None:
    """DELETE of a blob gets 202. Then every worker answers 404 for the blob (end-10)."""
    path = f"{push.root}/blobs/{push.blob(algorithm=algorithm)}"
    assert push.client.delete(path).status_code == 202
    for method in ("GET", "HEAD"):
        assert statuses_of_all_workers(push.client, method, path) == {404}


def test_deleting_blobs_in_use(push: Pusher) -> None:
    """DELETE of a blob that a manifest refers to gets 405, and the blob stays. The message names the manifest that has
    to be deleted first. Once this manifest is deleted, DELETE of the blob gets 202. The spec's conformance program
    accepts 405 for a blob whose manifest it has not deleted."""
    image = push.image()
    digest, config = push.put(encode(image), "used"), image["config"]["digest"]
    answer = push.client.delete(f"{push.root}/blobs/{config}")
    assert (answer.status_code, error_codes(answer)) == (405, ["UNSUPPORTED"])
    assert "DELETE" not in answer.headers["allow"]
    assert f"such as {digest}, refer to the blob {config}; delete" in answer.json()["errors"][0]["message"]
    assert statuses_of_all_workers(push.client, "GET", f"{push.root}/blobs/{config}") == {200}
    assert push.client.delete(f"{push.root}/manifests/{digest}").status_code == 202
    assert push.client.delete(f"{push.root}/blobs/{config}").status_code == 202


def test_pushing_deleted_content_again(push: Pusher) -> None:
    """Deleted content can be pushed again at once (Content Management)."""
    data, body = b"again " + push.repo.encode(), encode(push.image())
    for _ in range(3):
        blob, manifest = push.blob(data), push.put(body, "again")
        assert push.client.get(f"{push.root}/blobs/{blob}").content == data
        assert push.client.get(f"{push.root}/manifests/again").content == body
        assert push.client.delete(f"{push.root}/blobs/{blob}").status_code == 202
        assert push.client.delete(f"{push.root}/manifests/{manifest}").status_code == 202


def test_deleting_missing_content(push: Pusher, algorithm: str) -> None:
    """DELETE of an unknown tag, manifest or blob, or in an unknown repository, gets 404 (end-9, end-10)."""
    missing = digest_of(b"missing", algorithm)
    for _ in range(2):
        for path in ("manifests/missing", f"manifests/{missing}", f"blobs/{missing}"):
            answer = push.client.delete(f"{push.root}/{path}")
            assert answer.status_code == 404
            assert error_codes(answer)[0] in ("MANIFEST_UNKNOWN", "BLOB_UNKNOWN", "NAME_UNKNOWN")
        push.tag("exists")  # creates the repository for the second round


def test_deleting_twice(push: Pusher) -> None:
    """A second DELETE of the same tag or blob gets 404 (end-9, end-10)."""
    push.tag("once")
    blob = push.blob()
    for path in ("manifests/once", f"blobs/{blob}"):
        assert push.client.delete(f"{push.root}/{path}").status_code == 202
        assert push.client.delete(f"{push.root}/{path}").status_code == 404


def test_deleting_an_index_keeps_its_manifests(push: Pusher) -> None:
    """When an index is deleted, the manifests that it lists stay (end-9)."""
    body = push.tag("child")
    digest = push.put(push.index(describe(body, OCI_MANIFEST)), "index")
    assert push.client.delete(f"{push.root}/manifests/{digest}").status_code == 202
    assert push.client.get(f"{push.root}/manifests/child").content == body


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """Yields a client of a server with deletion disabled."""
    with (
        running_server(tmp_path_factory.mktemp("keeping"), env={"ENTREPOT_DELETE": "false"}) as server,
        make_client(server.url) as client,
    ):
        yield client


def test_disabled_deletes(keeping: httpx2.Client, repo: str) -> None:
    """With deletion disabled, DELETE of a tag, a manifest or a blob gets 405, and the content stays (Content
    Management)."""
    push = Pusher(keeping, repo)
    body = push.tag("kept")
    blob = push.blob()
    for path in ("manifests/kept", f"manifests/{digest_of(body)}", f"blobs/{blob}"):
        answer = keeping.delete(f"{push.root}/{path}")
        assert answer.status_code == 405
        assert error_codes(answer) == ["UNSUPPORTED"]
        assert keeping.get(f"{push.root}/{path}").status_code == 200


def test_disabled_deletes_leave_uploads_alone(keeping: httpx2.Client, repo: str) -> None:
    """With deletion disabled, a client can still cancel an upload, because no content is deleted (Cancel a blob
    upload)."""
    assert keeping.delete(Pusher(keeping, repo).start()).status_code == 204
