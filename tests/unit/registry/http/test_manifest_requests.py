"""Requests for manifests (OCI distribution spec, "Pulling manifests", "Pushing Manifests", "Deleting Manifests")."""

from __future__ import annotations

import json

import pytest

from registry.http import DistributionAPI, RequestLimits
from storage.content import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Descriptor, digest_of
from storage.memory_registry import MemoryRegistry
from storage.patterns import NamePattern
from storage.tag_rules import ImmutableTags, TagPattern, TagRule
from tests.fakes.asgi_client import AsgiAnswer, AsgiClient
from tests.unit.registry.conftest import V2, image, put_blob, put_image

TYPE = {"Content-Type": OCI_MANIFEST}


@pytest.fixture(autouse=True)
async def config(registry: MemoryRegistry) -> None:
    """Pushes the config to which the manifests of `image` refer."""
    await put_blob(registry, b"{}")


async def put(client: AsgiClient, reference: str, body: bytes, headers: dict[str, str] | None = None) -> AsgiAnswer:
    return await client("PUT", f"{V2}/manifests/{reference}", TYPE | (headers or {}), body)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_pull_by_tag_and_digest(client: AsgiClient, registry: MemoryRegistry, method: str) -> None:
    """The response has the media type, length, digest and ETag. Caches may use a response to a request by digest
    without revalidation, but not one to a request by tag."""
    stored = await put_image(registry, "1.0")
    for reference, caching in ((stored.digest, "max-age=31536000, immutable"), ("1.0", "no-cache")):
        answer = await client(method, f"{V2}/manifests/{reference}")
        assert answer.status == 200
        assert answer["docker-content-digest"] == stored.digest
        assert answer["etag"] == f'"{stored.digest}"'
        assert answer["content-type"] == OCI_MANIFEST
        assert answer["content-length"] == str(stored.size)
        assert answer["cache-control"] == caching
        not_modified = await client(method, f"{V2}/manifests/{reference}", {"If-None-Match": answer["etag"]})
        assert (not_modified.status, not_modified["etag"], not_modified["cache-control"]) == (
            304,
            answer["etag"],
            caching,
        )


async def test_accept_does_not_convert_the_manifest(client: AsgiClient, registry: MemoryRegistry) -> None:
    """The manifest is sent as it was pushed, even if Accept does not list its type."""
    stored = await put_image(registry, "1.0")
    answer = await client("GET", f"{V2}/manifests/1.0", {"Accept": DOCKER_MANIFEST})
    assert (answer.status, answer["docker-content-digest"]) == (200, stored.digest)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_push_by_digest(client: AsgiClient, algorithm: str) -> None:
    """A push by digest gets 201 with this digest. A GET of the Location returns exactly the bytes that were pushed,
    including white space."""
    body = b"\n" + image(annotations={"z": "1", "a": "\u00e9"}).replace(b", ", b"  ,\t") + b"\n"
    digest = digest_of(body, algorithm)
    answer = await put(client, digest, body)
    assert (answer.status, answer["docker-content-digest"]) == (201, digest)
    pull_answer = await client("GET", answer["location"])
    assert (pull_answer.body, pull_answer["docker-content-digest"]) == (body, digest)


async def test_another_media_type_of_an_immutable_tag() -> None:
    """If an immutable tag points at a manifest, a push of the same bytes by digest gets 403 DENIED if it has another
    Content-Type, and 201 if it has the same one. The manifest is served with the first Content-Type."""
    rules = ImmutableTags([TagRule((NamePattern("**"),), (TagPattern("1.*"),))])
    strict = MemoryRegistry(immutable_tags=rules)
    await put_blob(strict, b"{}")
    client = AsgiClient(DistributionAPI(strict))
    body = image(mediaType=None)
    digest = digest_of(body)
    assert (await put(client, "1.0", body)).status == 201
    refused = await put(client, digest, body, {"Content-Type": DOCKER_MANIFEST})
    assert (refused.status, refused.code) == (403, "DENIED")
    assert (await put(client, digest, body)).status == 201
    assert (await client("GET", f"{V2}/manifests/1.0"))["content-type"] == OCI_MANIFEST


async def test_push_by_tag(client: AsgiClient) -> None:
    """Location has the digest, because the tag can move later. Without tags in the query and without a subject, the
    response has no OCI-Tag and no OCI-Subject."""
    body = image()
    answer = await put(client, "1.0", body)
    assert answer["location"] == f"{V2}/manifests/{digest_of(body)}"
    assert "oci-tag" not in answer
    assert "oci-subject" not in answer
    assert (await client("GET", f"{V2}/manifests/1.0")).body == body


async def test_the_body_may_arrive_in_chunks(client: AsgiClient) -> None:
    """A manifest may be sent without a Content-Length, in chunked transfer coding."""
    body = image()
    answer = await client("PUT", f"{V2}/manifests/1.0", TYPE, [body[:10], body[10:]])
    assert answer["docker-content-digest"] == digest_of(body)


async def test_content_type_parameters_are_ignored(client: AsgiClient) -> None:
    """The media type is stored without the parameters of Content-Type."""
    answer = await put(client, "1.0", image(), {"Content-Type": f"{OCI_MANIFEST}; charset=utf-8"})
    assert answer.status == 201
    assert (await client("HEAD", f"{V2}/manifests/1.0"))["content-type"] == OCI_MANIFEST


async def test_without_a_content_type_the_media_type_in_the_body_is_used(client: AsgiClient) -> None:
    """If Content-Type is missing or empty, the media type in the body is used."""
    body = image()
    assert (await client("PUT", f"{V2}/manifests/1.0", {}, body)).status == 201
    assert (await client("PUT", f"{V2}/manifests/1.0", {"Content-Type": ""}, body)).status == 201


@pytest.mark.parametrize(
    "headers",
    [
        [("Content-Type", OCI_INDEX)],
        [("Content-Type", "text/plain")],
        [("Content-Type", OCI_MANIFEST), ("Content-Type", OCI_INDEX)],
        [("Content-Type", "\xe9")],
    ],
)
async def test_a_wrong_content_type_is_400(client: AsgiClient, headers: list[tuple[str, str]]) -> None:
    """A Content-Type gets 400 if it contradicts the body, is not a manifest's type, occurs twice, or is not text."""
    answer = await client("PUT", f"{V2}/manifests/1.0", headers, image())
    assert (answer.status, answer.code) == (400, "MANIFEST_INVALID")


@pytest.mark.parametrize("text", ["\ud800", "x\udfff"])
async def test_a_lone_surrogate_is_400(client: AsgiClient, text: str) -> None:
    """A manifest with a lone surrogate in a JSON string gets 400, because UTF-8 cannot represent it. Nothing is
    stored."""
    for fields in ({"artifactType": text}, {"annotations": {text: "x"}}):
        answer = await put(client, "1.0", image(**fields))
        assert (answer.status, answer.code) == (400, "MANIFEST_INVALID")
    assert (await put(client, "1.0", image(annotations={"k": "\U0001f600"}))).status == 201


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"a":1,"a":2}', b"[" * 100_000, b"{}" * 200_000])
async def test_a_body_that_is_no_manifest_is_400(client: AsgiClient, body: bytes) -> None:
    """A body that is not a manifest gets 400, whether it is small or so large that it is parsed in a thread."""
    answer = await put(client, "1.0", body)
    assert (answer.status, answer.code) == (400, "MANIFEST_INVALID")
    assert (await client("GET", f"{V2}/manifests/1.0")).status == 404


async def test_a_digest_mismatch_is_400(client: AsgiClient) -> None:
    """If the body does not have the digest in the path, the push gets 400."""
    answer = await put(client, digest_of(b"other"), image())
    assert (answer.status, answer.code) == (400, "DIGEST_INVALID")


async def test_the_error_names_missing_content(client: AsgiClient) -> None:
    """The error MANIFEST_BLOB_UNKNOWN names the content that has to be pushed first."""
    missing = digest_of(b"missing")
    answer = await put(client, "1.0", image(b"missing"))
    assert (answer.status, answer.code) == (404, "MANIFEST_BLOB_UNKNOWN")
    assert missing in json.dumps(answer.json)


async def test_a_manifest_larger_than_the_limit_is_413(client: AsgiClient) -> None:
    """A manifest of 4 MiB is accepted. A manifest larger than the limit gets 413, whether its length was declared or
    shows only when its bytes are received."""
    limit_bytes = RequestLimits().manifest_bytes
    assert limit_bytes >= 4 << 20
    large = image(annotations={"x": "y" * ((4 << 20) - 1000)})
    assert (await put(client, "1.0", large)).status == 201
    declared = await put(client, "2.0", b"", {"Content-Length": str(limit_bytes + 1)})
    received = await client(
        "PUT", f"{V2}/manifests/2.0", TYPE, [bytes(1 << 20)] * (limit_bytes // (1 << 20)) + [b"x", b"y"]
    )
    for answer in (declared, received):
        assert (answer.status, answer.code) == (413, "MANIFEST_INVALID")
    exact = image(annotations={"x": "y" * (limit_bytes - len(image(annotations={"x": ""})))})
    assert len(exact) == limit_bytes
    assert (await put(client, "3.0", exact)).status == 201


async def test_a_disconnect_stores_nothing(client: AsgiClient) -> None:
    """If the client disconnects before the declared length has arrived, nothing is stored, even if the received bytes
    are a valid manifest."""
    body = image()
    answer = await client("PUT", f"{V2}/manifests/1.0", TYPE | {"Content-Length": "9999"}, body, leaves=True)
    assert answer.status == 0
    assert (await client("GET", f"{V2}/manifests/1.0")).status == 404


async def test_tags_in_the_query(client: AsgiClient) -> None:
    """Each `?tag=` sets a tag to the manifest, and OCI-Tag names each tag once."""
    body = image()
    answer = await put(client, f"{digest_of(body)}?tag=1.2.3&tag=1.2&tag=1&tag=latest&tag=1", body)
    assert answer.status == 201
    assert answer.all("oci-tag") == ["1.2.3", "1.2", "1", "latest"]
    for tag in answer.all("oci-tag"):
        assert (await client("GET", f"{V2}/manifests/{tag}")).body == body


async def test_tags_in_the_query_and_in_the_path(client: AsgiClient) -> None:
    """If the path has a tag, the tags in the query are set as well, although the spec allows them only with a
    digest."""
    answer = await put(client, "1?tag=2", image())
    assert answer.all("oci-tag") == ["2"]
    assert [(await client("HEAD", f"{V2}/manifests/{tag}")).status for tag in "12"] == [200, 200]


async def test_too_many_tags_are_414_and_none_is_set(registry: MemoryRegistry) -> None:
    """More tags than the limit get 414. An invalid tag among valid tags gets 400. In both cases nothing is stored."""
    client = AsgiClient(DistributionAPI(registry, limits=RequestLimits(tags_per_put=10)))
    body = image()
    too_many = "&".join(f"tag=t{number}" for number in range(11))
    answer = await put(client, f"{digest_of(body)}?{too_many}", body)
    assert (answer.status, answer.code) == (414, "MANIFEST_INVALID")
    assert (await put(client, f"{digest_of(body)}?tag=ok&tag=-bad", body)).code == "MANIFEST_INVALID"
    assert (await client("GET", f"{V2}/manifests/{digest_of(body)}")).status == 404
    assert (await put(client, f"{digest_of(body)}?{too_many.rpartition('&')[0]}", body)).status == 201


async def test_subject_is_acknowledged(client: AsgiClient) -> None:
    """OCI-Subject tells the client that it need not push a fallback tag. The subject need not exist."""
    subject = digest_of(b"later")
    body = image(subject={"mediaType": OCI_MANIFEST, "digest": subject, "size": 5})
    assert (await put(client, "1.0", body))["oci-subject"] == subject


async def test_if_match_protects_a_tag(client: AsgiClient) -> None:
    """A PUT with If-Match succeeds only if the tag still points at the manifest that the client has seen. Otherwise it
    gets 412."""
    first, second = image(), image(annotations={"n": "2"})
    assert (await put(client, "1", first, {"If-Match": "*"})).status == 412
    assert (await put(client, "1", first, {"If-None-Match": "*"})).status == 201
    assert (await put(client, "1", second, {"If-None-Match": "*"})).status == 412
    answer = await put(client, "1", second, {"If-Match": f'"{digest_of(second)}"'})
    assert (answer.status, answer.code) == (412, "MANIFEST_INVALID")
    assert (await put(client, "1", second, {"If-Match": f'W/"{digest_of(first)}"'})).status == 412
    assert (await put(client, "1", second, {"If-Match": f'"x", "{digest_of(first)}"'})).status == 201
    assert (await client("GET", f"{V2}/manifests/1")).body == second


@pytest.mark.parametrize(
    "headers", [{"If-Match": "bare"}, {"If-None-Match": ""}, {"If-Match": '"a"', "If-None-Match": '"b"'}]
)
async def test_a_condition_that_cannot_be_parsed_is_400(client: AsgiClient, headers: dict[str, str]) -> None:
    """A condition that cannot be parsed gets 400. It is not ignored, because the client relies on it to protect
    content."""
    answer = await put(client, "1", image(), headers)
    assert (answer.status, answer.code) == (400, "UNSUPPORTED")


async def test_a_condition_on_a_digest(client: AsgiClient) -> None:
    """For a PUT by digest, `If-None-Match: *` is true as long as the manifest does not exist. `If-Match: *` is true
    once the manifest exists."""
    body = image()
    assert (await put(client, digest_of(body), body, {"If-Match": "*"})).status == 412
    assert (await put(client, digest_of(body), body, {"If-None-Match": "*"})).status == 201
    assert (await put(client, digest_of(body), body, {"If-None-Match": "*"})).status == 412
    assert (await put(client, digest_of(body), body, {"If-Match": "*"})).status == 201


async def test_delete_a_tag(client: AsgiClient, registry: MemoryRegistry) -> None:
    """A DELETE of a tag gets 202. The tag is deleted, but its manifest and the other tags stay."""
    stored = await put_image(registry, "1", "2")
    assert (await client("DELETE", f"{V2}/manifests/1")).status == 202
    assert [(await client("GET", f"{V2}/manifests/{ref}")).status for ref in ("1", "2", stored.digest)] == [
        404,
        200,
        200,
    ]
    assert (await client("DELETE", f"{V2}/manifests/1")).code == "MANIFEST_UNKNOWN"


async def test_delete_a_manifest(client: AsgiClient, registry: MemoryRegistry) -> None:
    """A DELETE of a manifest gets 202. The manifest and all tags that point at it are deleted. An unknown repository
    gets 404."""
    stored = await put_image(registry, "1", "2")
    assert (await client("DELETE", f"{V2}/manifests/{stored.digest}")).status == 202
    assert [(await client("GET", f"{V2}/manifests/{ref}")).status for ref in ("1", "2", stored.digest)] == [
        404,
        404,
        404,
    ]
    answer = await client("DELETE", f"/v2/never/heard/manifests/{stored.digest}")
    assert (answer.status, answer.code) == (404, "NAME_UNKNOWN")


async def test_a_put_with_many_tags_has_few_header_lines(client: AsgiClient) -> None:
    """The response to a PUT with the largest number of tags has fewer than 90 header lines. Common clients accept up to
    100. A PUT with more tags gets 414."""
    limit = RequestLimits().tags_per_put
    body = image()

    def path(count: int) -> str:
        return f"{V2}/manifests/{digest_of(body)}?" + "&".join(f"tag=t{number}" for number in range(count))

    answer = await client("PUT", path(limit), TYPE, body)
    assert answer.status == 201
    assert len(answer.all("oci-tag")) == limit
    assert len(answer.fields) < 90
    refused = await client("PUT", path(limit + 1), TYPE, body)
    assert refused.status == 414
    assert f"at most {limit} are accepted" in refused.json["errors"][0]["message"]


async def test_a_long_media_type_is_400(client: AsgiClient) -> None:
    """A very long media type gets 400, because it would be repeated in every list and every HEAD."""
    for fields in ({"artifactType": "a" * 300}, {"subject": _descriptor("a" * 300)}):
        answer = await client("PUT", f"{V2}/manifests/1", TYPE, image(**fields))
        assert (answer.status, answer.code) == (400, "MANIFEST_INVALID")
        assert "at most 255 are accepted" in answer.json["errors"][0]["message"]


def _descriptor(media_type: str) -> dict[str, object]:
    return Descriptor(media_type, digest_of(b"{}"), 2).as_json()
