"""Spec, "Pulling manifests": the grammar of names, tags and digests."""

from __future__ import annotations

import httpx2
import pytest

from tests.conformance.pusher import Pusher, digest_of, error_codes, with_query

VALID_NAMES = ["a", "0", "a.b", "a_b", "a__b", "a-b", "a-----b", "a/b", "a/b/c/d/e/f", "1.2/3_4/5__6/7--8", "blobs/x"]
INVALID_NAMES = [
    "A",
    "a..b",
    "a___b",
    "a.-b",
    "-a",
    "a-",
    ".a",
    "a.",
    "_a/b",
    "a//b",
    "/a",
    "a/",
    "a b",
    "ä",
    "a+b",
    "a:b",
]
VALID_TAGS = ["a", "A", "_", "0", "_.-", "v1.2.3-rc.1", "a" * 128, "latest", "list", "sha256-abc"]
INVALID_TAGS = [".a", "-a", "a" * 129, "a+b", "a b", "ä", "a@b", "a%b"]


@pytest.mark.parametrize("name", [*VALID_NAMES, "n" * 255, "/".join(["abcdefg"] * 31) + "/abcdefg"])
def test_valid_names_hold_content(client: httpx2.Client, name: str) -> None:
    """Clients can push to and pull from a repository with any name that matches the grammar and has at most 255
    characters (Pulling manifests)."""
    push = Pusher(client, name)
    digest = push.put(push.image(), "here")
    answer = client.get(f"/v2/{name}/manifests/here")
    assert answer.status_code == 200
    assert answer.headers["docker-content-digest"] == digest


@pytest.mark.parametrize("name", [*INVALID_NAMES, "n" * 256])
@pytest.mark.parametrize(
    ("method", "endpoint"),
    [("GET", "manifests/tag"), ("PUT", "manifests/tag"), ("POST", "blobs/uploads/"), ("GET", "tags/list")],
)
def test_invalid_names_are_refused(client: httpx2.Client, name: str, method: str, endpoint: str) -> None:
    """A name that is invalid or longer than 255 characters gets NAME_INVALID (Pulling manifests). A name that starts
    with `_` may get 404 instead, because such paths are reserved for extensions."""
    answer = client.request(method, f"{client.base_url}/v2/{name}/{endpoint}", content=b"")
    if name.startswith("_"):
        assert answer.status_code in (400, 404)
    else:
        assert answer.status_code == 400
        assert error_codes(answer) == ["NAME_INVALID"]


@pytest.mark.parametrize("tag", VALID_TAGS)
def test_valid_tags(push: Pusher, tag: str) -> None:
    """A tag has up to 128 characters of `[a-zA-Z0-9_][a-zA-Z0-9._-]*` (Pulling manifests)."""
    body = push.tag(tag)
    assert push.client.get(f"{push.root}/manifests/{tag}").content == body
    assert push.client.get(f"{push.root}/tags/list").json()["tags"] == [tag]


@pytest.mark.parametrize("tag", INVALID_TAGS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
def test_invalid_tags_are_refused(push: Pusher, tag: str, method: str) -> None:
    """A reference that is neither a tag nor a digest gets 400 (Pulling manifests)."""
    body = push.tag("good")
    reference = tag.replace("%", "%25")
    answer = push.client.request(method, f"{push.root}/manifests/{reference}", content=body)
    assert answer.status_code == 400
    if method != "HEAD":
        assert error_codes(answer) == ["MANIFEST_INVALID"]


def test_tags_differ_by_case(push: Pusher) -> None:
    """`v1` and `V1` are two tags (Pulling manifests)."""
    lower, upper = push.tag("v1"), push.tag("V1")
    assert push.client.get(f"{push.root}/manifests/v1").content == lower
    assert push.client.get(f"{push.root}/manifests/V1").content == upper


BAD_DIGESTS = [
    "sha256:baddigeststring",
    "sha256:",
    "sha256:" + "A" * 64,
    "sha256:" + "0" * 63,
    "sha256:" + "0" * 65,
    "sha512:" + "0" * 64,
    "md5:d41d8cd98f00b204e9800998ecf8427e",
    "blake3:" + "0" * 64,
    ":" + "0" * 64,
]


@pytest.mark.parametrize("digest", BAD_DIGESTS)
def test_bad_digests_are_refused_on_push(push: Pusher, digest: str) -> None:
    """A digest that is invalid or has an unsupported algorithm gets 400 in every form of upload (Pushing blobs)."""
    client = push.client
    answers = [
        client.put(with_query(push.start(), digest=digest), content=b"data"),
        client.post(with_query(f"{push.root}/blobs/uploads/", digest=digest), content=b"data"),
        client.post(with_query(f"{push.root}/blobs/uploads/", mount=digest, **{"from": push.repo})),
        client.put(f"{push.root}/manifests/{digest}", content=b"{}"),
    ]
    for answer in answers:
        assert answer.status_code == 400
        assert error_codes(answer) == ["DIGEST_INVALID"]


@pytest.mark.parametrize("digest", BAD_DIGESTS)
@pytest.mark.parametrize("kind", ["manifests", "blobs", "referrers"])
def test_bad_digests_are_refused_on_pull(push: Pusher, digest: str, kind: str) -> None:
    """A pull of an invalid digest gets 400 (Pulling manifests, Listing Referrers)."""
    push.tag("exists")
    answer = push.client.get(f"{push.root}/{kind}/{digest}")
    assert answer.status_code == 400
    assert error_codes(answer) == ["DIGEST_INVALID"]


def test_both_algorithms_name_the_same_bytes(push: Pusher) -> None:
    """The same bytes pushed under sha256 and under sha512 can be pulled under both, as two blobs (Pulling blobs)."""
    data = b"one content, two digests " + push.repo.encode()
    for algorithm in ("sha256", "sha512"):
        push.blob(data, algorithm)
    for algorithm in ("sha256", "sha512"):
        digest = digest_of(data, algorithm)
        answer = push.client.get(f"{push.root}/blobs/{digest}")
        assert answer.content == data
        assert answer.headers["docker-content-digest"] == digest
