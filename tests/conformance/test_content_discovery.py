"""Spec, "Content Discovery": listing tags, listing referrers, enabling the referrers API; and the catalog."""

from __future__ import annotations

import json
import os
import re
from typing import Any
from urllib.parse import quote

import httpx2
import pytest

from tests.conformance.pusher import (
    MIB,
    OCI_CONFIG,
    OCI_EMPTY,
    OCI_INDEX,
    OCI_MANIFEST,
    Document,
    Pusher,
    describe,
    digest_of,
    encode,
    error_codes,
    new_client,
    with_query,
)

NEXT = re.compile(r'<([^<>]+)>; rel="next"')
TAGS = ["0", "A", "B", "_", "a", "a-b", "a.b", "a0", "b", "v1.10", "v1.9", "z"]


def next_of(answer: httpx2.Response) -> str | None:
    """Returns the target of the header Link with `rel="next"` (RFC 8288); None without this header."""
    if "link" not in answer.headers:
        return None
    found = NEXT.fullmatch(answer.headers["link"])
    assert found is not None
    return found[1]


def pages(client: httpx2.Client, path: str | None) -> list[Any]:
    """Returns the document of each page of a list. Follows the header Link, with a new connection for each page."""
    found: list[Any] = []
    while path is not None:
        with new_client(client) as other:
            answer = other.get(path)
        assert answer.status_code == 200
        found.append(answer.json())
        path = next_of(answer)
        assert len(found) < 1000
    return found


@pytest.fixture
def tagged(push: Pusher) -> Pusher:
    body = encode(push.image())
    for tag in reversed(TAGS):
        push.put(body, tag)
    return push


def test_listing_tags(tagged: Pusher) -> None:
    """The response is 200 with the name and all tags in ASCII order (end-8a)."""
    answer = tagged.client.get(f"{tagged.root}/tags/list")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"name": tagged.repo, "tags": sorted(TAGS)}
    assert "link" not in answer.headers


@pytest.mark.parametrize("count", [1, 2, 5, 11, 12, 13, 1000, 10**17])
def test_listing_tags_in_pages(tagged: Pusher, count: int) -> None:
    """`n` limits the size of a page. Link leads to the next page. All pages together are the whole list (end-8b)."""
    found = [page["tags"] for page in pages(tagged.client, f"{tagged.root}/tags/list?n={count}")]
    assert [tag for page in found for tag in page] == sorted(TAGS)
    assert all(len(page) == count for page in found[:-1])
    assert len(found) == -(-len(TAGS) // count)


def test_listing_no_tags(tagged: Pusher) -> None:
    """`n=0` gives an empty list and no Link (end-8b)."""
    answer = tagged.client.get(f"{tagged.root}/tags/list?n=0")
    assert answer.json() == {"name": tagged.repo, "tags": []}
    assert "link" not in answer.headers


@pytest.mark.parametrize("last", [*TAGS, "Z", "a.", "zz", "%21", "a%2Fb"])
@pytest.mark.parametrize("count", [None, 3])
def test_listing_tags_after(tagged: Pusher, last: str, count: int | None) -> None:
    """The list starts strictly after `last`, with or without `n`, whether or not `last` is a tag (end-8b)."""
    decoded = last.replace("%21", "!").replace("%2F", "/")
    expected = [tag for tag in sorted(TAGS) if tag > decoded][:count]
    size = "" if count is None else f"&n={count}"
    assert tagged.client.get(f"{tagged.root}/tags/list?last={last}{size}").json()["tags"] == expected


def test_listing_tags_of_a_repository_without_tags(push: Pusher) -> None:
    """If all tags were deleted, the list is an empty array, not null (end-8a)."""
    push.tag("only")
    assert push.client.delete(f"{push.root}/manifests/only").status_code == 202
    assert push.client.get(f"{push.root}/tags/list").json() == {"name": push.repo, "tags": []}


def test_listing_tags_of_an_unknown_repository(push: Pusher) -> None:
    """An unknown repository gets 404 NAME_UNKNOWN (end-8a)."""
    answer = push.client.get(f"{push.root}/tags/list")
    assert answer.status_code == 404
    assert error_codes(answer) == ["NAME_UNKNOWN"]


@pytest.mark.parametrize(
    "query", ["n=-1", "n=x", "n=1.5", "n=", "n=1&n=2", "n=%31%00", "last=%ff", "n=9999999999999999999"]
)
def test_listing_tags_with_a_bad_query(tagged: Pusher, query: str) -> None:
    """An invalid `n` or `last` gets 400 (end-8b)."""
    answer = tagged.client.get(f"{tagged.client.base_url}{tagged.root}/tags/list?{query}")
    assert answer.status_code == 400
    error_codes(answer)  # checks the form of the error response


def test_the_catalog(push: Pusher) -> None:
    """`/v2/_catalog` lists the repositories in pages, without those that have no content (Docker's API)."""
    names = sorted(f"{push.repo}/{name}" for name in ("a", "b", "b-c", "b/c", "d"))
    for name in names:
        Pusher(push.client, name).tag("x")
    Pusher(push.client, f"{push.repo}/c").blob()
    for count in (1, 2, 100):
        found = pages(push.client, f"/v2/_catalog?n={count}&last={quote(push.repo, safe='')}")
        listed = [name for page in found for name in page["repositories"]]
        assert [name for name in listed if name.startswith(push.repo)] == names
    answer = push.client.get("/v2/_catalog?n=0")
    assert answer.json() == {"repositories": []}
    assert "link" not in answer.headers


def listed(push: Pusher, subject: str, artifact_type: str | None = None) -> list[Document]:
    """Returns the descriptors of all listed referrers of the digest `subject`."""
    parameters = {"artifactType": artifact_type} if artifact_type else {}
    path = with_query(f"{push.root}/referrers/{subject}", **parameters)
    return [entry for page in pages(push.client, path) for entry in page["manifests"]]


def test_listing_no_referrers(push: Pusher, algorithm: str) -> None:
    """The response is 200 with an empty index, whether or not subject and repository exist (end-12a)."""
    missing = digest_of(b"missing", algorithm)
    for _ in range(2):
        answer = push.client.get(f"{push.root}/referrers/{missing}")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == OCI_INDEX
        assert answer.json() == {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
        push.tag("exists")  # creates the repository for the second request


@pytest.mark.parametrize("order", ["subject first", "referrer first"])
def test_listing_referrers(push: Pusher, algorithm: str, order: str) -> None:
    """Each manifest with this subject is listed, with type, size, digest, artifactType and annotations (end-12a)."""
    target = encode(push.image())
    subject = describe(target, OCI_MANIFEST, algorithm)
    if order == "subject first":
        push.put(target, algorithm=algorithm)
    notes = {"org.opencontainers.image.created": "2026-01-01T00:00:00Z", "empty": "", "wide": "\u00e4\U0001f40b"}
    documents = [
        push.artifact(subject, "application/vnd.test.sbom", annotations=notes),
        push.artifact(subject, "application/vnd.test.signature"),
        push.index(subject=subject, artifactType="application/vnd.test.bundle", annotations=notes),
    ]
    for document in documents:
        push.put(document, algorithm=algorithm)
    if order == "referrer first":
        push.put(target, algorithm=algorithm)
    expected = []
    for document in documents:
        entry = describe(encode(document), document["mediaType"], algorithm, artifactType=document["artifactType"])
        expected.append(entry | ({"annotations": notes} if "annotations" in document else {}))
    found = listed(push, digest_of(target, algorithm))
    assert sorted(found, key=lambda entry: entry["digest"]) == sorted(expected, key=lambda entry: entry["digest"])


def test_artifact_types_of_referrers(push: Pusher) -> None:
    """The artifactType of a referrer is that of its manifest. If the manifest has none, it is the mediaType of the
    config for an image, and absent for an index (end-12a)."""
    target = encode(push.image())
    subject = describe(target, OCI_MANIFEST)
    with_own_type = push.put(push.artifact(subject, "a/own"))
    with_empty_config = push.put(push.artifact(subject))
    image = push.put(push.image(subject=subject))
    empty = push.put(push.image(subject=subject, artifactType=""))
    index = push.put(push.index(subject=subject))
    found = {entry["digest"]: entry.get("artifactType", "(absent)") for entry in listed(push, digest_of(target))}
    assert found == {
        with_own_type: "a/own",
        with_empty_config: OCI_EMPTY,
        image: OCI_CONFIG,
        empty: OCI_CONFIG,
        index: "(absent)",
    }


def test_filtering_referrers(push: Pusher) -> None:
    """`artifactType` filters the list, and the response has OCI-Filters-Applied. Without the filter, the response lacks
    this header (end-12b)."""
    target = encode(push.image())
    subject = describe(target, OCI_MANIFEST)
    wanted = push.put(push.artifact(subject, "application/vnd.test.a+json"))
    push.put(push.artifact(subject, "application/vnd.test.b"))
    push.put(push.index(subject=subject))
    path = f"{push.root}/referrers/{digest_of(target)}"
    for query in ("application/vnd.test.a%2Bjson", "application/vnd.test.a+json", "application%2Fvnd.test.a%2Bjson"):
        answer = push.client.get(f"{push.client.base_url}{path}?artifactType={query}")
        assert answer.headers["oci-filters-applied"] == "artifactType"
        assert [entry["digest"] for entry in answer.json()["manifests"]] == [wanted]
    answer = push.client.get(f"{path}?artifactType=none/such")
    assert answer.status_code == 200
    assert answer.json()["manifests"] == []
    assert answer.headers["oci-filters-applied"] == "artifactType"
    answer = push.client.get(path)
    assert "oci-filters-applied" not in answer.headers
    assert len(answer.json()["manifests"]) == 3


def test_many_referrers_come_in_pages(push: Pusher) -> None:
    """Referrers that do not fit into one manifest are listed in pages below 4 MiB. Link leads to the next page and
    keeps the filter (end-12a)."""
    target = encode(push.image())
    subject = describe(target, OCI_MANIFEST)
    kinds = ["a/even", "a/odd"]
    pushed = []
    for number in range(50):
        notes = {"padding": "x" * 130_000, "number": str(number)}
        pushed.append(push.put(push.artifact(subject, kinds[number % 2], annotations=notes)))
    for kind, expected in ((None, pushed), ("a/odd", pushed[1::2])):
        path: str | None = f"{push.root}/referrers/{digest_of(target)}" + (f"?artifactType={kind}" if kind else "")
        found: list[str] = []
        count = 0
        while path is not None:
            answer = push.client.get(path)
            assert len(answer.content) <= 4 * MIB
            assert answer.headers["content-type"] == OCI_INDEX
            assert ("oci-filters-applied" in answer.headers) == (kind is not None)
            found += [entry["digest"] for entry in answer.json()["manifests"]]
            path = next_of(answer)
            count += 1
        assert count > 1
        assert sorted(found) == sorted(expected)


def test_referrers_of_deleted_manifests(push: Pusher) -> None:
    """A referrer is not listed any more right after its deletion. The referrers of a deleted subject are still listed
    (end-12a, end-9)."""
    target = encode(push.image())
    push.put(target)
    subject = describe(target, OCI_MANIFEST)
    kept_digest = push.put(push.artifact(subject, "a/stays"))
    deleted_digest = push.put(push.artifact(subject, "a/goes"))
    assert push.client.delete(f"{push.root}/manifests/{deleted_digest}").status_code == 202
    for _ in range(8):  # each request has a new connection, so every worker answers some of them
        assert [entry["digest"] for entry in listed(push, digest_of(target))] == [kept_digest]
    assert push.client.delete(f"{push.root}/manifests/{digest_of(target)}").status_code == 202
    assert [entry["digest"] for entry in listed(push, digest_of(target))] == [kept_digest]


def test_referrers_belong_to_a_repository(push: Pusher) -> None:
    """A referrer in another repository is not listed (end-12a)."""
    target = encode(push.image())
    other = Pusher(push.client, f"{push.repo}/other")
    other.put(other.artifact(describe(target, OCI_MANIFEST), "a/b"))
    assert listed(push, digest_of(target)) == []
    assert len(listed(other, digest_of(target))) == 1


@pytest.mark.parametrize("order", ["index last", "index first"])
def test_enabling_the_referrers_api(push: Pusher, algorithm: str, order: str) -> None:
    """Clients of registries without the referrers API push an index with the referrers to the fallback tag of the
    subject. The referrers API also lists the manifests in this index (Enabling the Referrers API)."""
    target = encode(push.image())
    subject = describe(target, OCI_MANIFEST, algorithm)
    kind, _, encoded = digest_of(target, algorithm).partition(":")
    tag = f"{kind[:32]}-{encoded[:64]}"  # the spec cuts both parts to these lengths
    documents = [push.artifact(subject, f"a/{number}") for number in range(3)]
    for document in documents:
        push.put(document)
    if order == "index last":
        push.put(target, algorithm=algorithm)
    entries = [
        describe(encode(document), OCI_MANIFEST, artifactType=document["artifactType"]) for document in documents
    ]
    push.put(push.index(*entries), tag)
    if order == "index first":
        push.put(target, algorithm=algorithm)
    found = listed(push, digest_of(target, algorithm))
    assert sorted(entry["digest"] for entry in found) == sorted(entry["digest"] for entry in entries)
    stored_index = push.client.get(f"{push.root}/manifests/{tag}").json()
    assert stored_index["manifests"] == entries


def test_the_fallback_tag_is_an_ordinary_tag(push: Pusher) -> None:
    """A client may push its own index to the fallback tag. The index is stored, and the tag is listed, like any other
    (Referrers Tag Schema)."""
    target = push.tag("image")
    tag = digest_of(target).replace(":", "-")
    body = encode(push.index())
    push.put(body, tag)
    assert push.client.get(f"{push.root}/manifests/{tag}").content == body
    assert tag in push.client.get(f"{push.root}/tags/list").json()["tags"]
    assert json.loads(push.client.get(f"{push.root}/referrers/{digest_of(target)}").content)["manifests"] == []


def test_a_subject_of_any_kind(push: Pusher) -> None:
    """The subject may itself be an artifact that has a subject. Each subject has its own list of referrers
    (end-12a)."""
    image = encode(push.image())
    signature = push.artifact(describe(image, OCI_MANIFEST), "a/signature", annotations={"nonce": os.urandom(8).hex()})
    witness = push.artifact(describe(encode(signature), OCI_MANIFEST), "a/witness")
    push.put(signature)
    push.put(witness)
    assert [entry["artifactType"] for entry in listed(push, digest_of(image))] == ["a/signature"]
    assert [entry["artifactType"] for entry in listed(push, digest_of(encode(signature)))] == ["a/witness"]
