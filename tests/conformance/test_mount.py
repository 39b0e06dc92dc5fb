"""Spec, "Mounting a blob from another repository"."""

from __future__ import annotations

import os

import pytest

from tests.conformance.pusher import Pusher, digest_of, error_codes, statuses_of_all_workers, with_query


def mount_path(push: Pusher, digest: str, source: str | None = None) -> str:
    parameters = {"mount": digest} | ({"from": source} if source is not None else {})
    return with_query(f"{push.root}/mounted/blobs/uploads/", **parameters)


def test_mount(push: Pusher, algorithm: str) -> None:
    """A mount of a blob of the repository that `from` names gets 201. The blob can be pulled from Location (end-11)."""
    data = os.urandom(100)
    digest = push.blob(data, algorithm)
    answer = push.client.post(mount_path(push, digest, push.repo))
    assert answer.status_code == 201
    assert answer.headers["docker-content-digest"] == digest
    assert f"{push.root}/mounted/" in answer.headers["location"]
    assert push.client.get(answer.headers["location"]).content == data
    assert statuses_of_all_workers(push.client, "HEAD", answer.headers["location"]) == {200}


@pytest.mark.parametrize("source", [None, ""])
def test_mount_without_from(push: Pusher, algorithm: str, source: str | None) -> None:
    """Without `from`, a blob of any repository can be mounted (end-11)."""
    data = os.urandom(100)
    digest = push.blob(data, algorithm)
    answer = push.client.post(mount_path(push, digest, source))
    assert answer.status_code == 201
    assert push.client.get(answer.headers["location"]).content == data


@pytest.mark.parametrize("source", ["this", "empty", None])
def test_mount_of_a_missing_blob(push: Pusher, algorithm: str, source: str | None) -> None:
    """If the source repository does not have the blob, the response is 202, and Location is that of a new upload
    session (end-11)."""
    data = os.urandom(100)
    digest = digest_of(data, algorithm)
    source_name = {"this": push.repo, "empty": f"{push.repo}/never", None: None}[source]
    answer = push.client.post(mount_path(push, digest, source_name))
    assert answer.status_code == 202
    path = f"{push.root}/mounted/blobs/{digest}"
    assert push.client.get(path).status_code == 404
    assert push.client.put(with_query(answer.headers["location"], digest=digest), content=data).status_code == 201
    assert push.client.get(path).content == data


def test_mount_from_the_wrong_repository(push: Pusher) -> None:
    """A blob is not mounted if `from` names a repository without this blob, even if another repository has it
    (end-11)."""
    digest = push.blob()
    assert push.client.post(mount_path(push, digest, f"{push.repo}/elsewhere")).status_code == 202
    assert push.client.head(f"{push.root}/mounted/blobs/{digest}").status_code == 404


def test_mount_into_the_same_repository(push: Pusher) -> None:
    """A mount of a blob that the target repository already has succeeds (end-11)."""
    digest = push.blob()
    path = with_query(f"{push.root}/blobs/uploads/", mount=digest, **{"from": push.repo})
    assert push.client.post(path).status_code == 201


def test_mount_from_an_invalid_name(push: Pusher) -> None:
    """An invalid name in `from` gets 400 (Pulling manifests)."""
    answer = push.client.post(mount_path(push, push.blob(), "NOT/a/name"))
    assert answer.status_code == 400
    assert error_codes(answer) == ["NAME_INVALID"]


def test_mount_of_a_deleted_blob(push: Pusher) -> None:
    """A blob that was deleted from its only repository cannot be mounted from there (end-11)."""
    digest = push.blob()
    assert push.client.delete(f"{push.root}/blobs/{digest}").status_code == 202
    assert push.client.post(mount_path(push, digest, push.repo)).status_code == 202


def test_a_mounted_blob_stays(push: Pusher) -> None:
    """A mounted blob stays in the target repository when it is deleted from the source repository (end-11)."""
    data = os.urandom(100)
    digest = push.blob(data)
    location = push.client.post(mount_path(push, digest, push.repo)).headers["location"]
    assert push.client.delete(f"{push.root}/blobs/{digest}").status_code == 202
    assert push.client.get(f"{push.root}/blobs/{digest}").status_code == 404
    assert push.client.get(location).content == data
