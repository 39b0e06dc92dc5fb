"""The APIs that list the referrers of a manifest (signatures, SBOMs, attestations) and show their files."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest

from registry.browse import bounded_text
from registry.browse.file_texts import MAX_FILE_BYTES, MAX_STATEMENT_CHARACTERS, MAX_STATEMENT_DEPTH, file_text_of
from storage.content import Descriptor, Manifest
from storage.names import Digest, Tag
from tests.fakes.registry_content import BY, image_of, index_of, push_blob
from tests.unit.registry.browse.conftest import APP, Site

EMPTY = "application/vnd.oci.empty.v1+json"
SPDX = "https://spdx.dev/Document"


async def push_artifact(
    site: Site, subject: Digest | None, *files: Descriptor, tag: str = "", **fields: Any
) -> Manifest:
    """Pushes an artifact with these files."""
    config = replace(await push_blob(site.registry, APP, b"{}"), media_type=EMPTY)
    manifest = image_of(config, files, subject=subject, **fields)
    await site.registry.put_manifest(APP, manifest, [Tag(tag)] if tag else [], by=BY)
    return manifest


async def push_file(site: Site, data: bytes, media_type: str = "text/plain", **annotations: str) -> Descriptor:
    return replace(await push_blob(site.registry, APP, data), media_type=media_type, annotations=annotations or None)


async def get_groups(site: Site, reference: str = "v1") -> list[dict[str, Any]]:
    """Returns the referrers of a manifest, in groups."""
    referrer_groups: list[dict[str, Any]] = (await site.json(f"{APP}/manifests/{reference}/referrers"))["groups"]
    return referrer_groups


async def test_referrers_are_grouped(site: Site) -> None:
    """Referrers are grouped by purpose and artifact type. Signatures come first, then SBOMs, attestations and other
    artifacts. Here they are pushed in the form that `oras attach` uses."""
    image = await site.image("v1")
    for kind in ("x/other", "application/spdx+json", "application/vnd.cncf.notary.signature", "x/other"):
        titled = await push_file(site, b"text", **{"org.opencontainers.image.title": "<a>.txt"})
        note = str(len(await get_groups(site)) + 10 * len(kind))
        await push_artifact(site, image.digest, titled, artifactType=kind, annotations={"note": note})
    await push_artifact(site, image.digest, artifactType="application/vnd.in-toto+json")
    referrer_groups = await get_groups(site)
    assert [(group["purpose"], group["artifact_type"], len(group["referrers"])) for group in referrer_groups] == [
        ("signature", "application/vnd.cncf.notary.signature", 1),
        ("sbom", "application/spdx+json", 1),
        ("attestation", "application/vnd.in-toto+json", 1),
        ("other", "x/other", 2),
    ]
    [referrer] = referrer_groups[0]["referrers"]
    assert (referrer["about"], referrer["tag"], referrer["files"][0]["title"]) == (image.digest, None, "<a>.txt")
    assert await get_groups(site, image.digest) == referrer_groups


async def test_referrers_in_cosigns_old_tags(site: Site) -> None:
    """Older versions of cosign push signatures, SBOMs and attestations under tags with the digest of the image. They
    are listed as referrers."""
    image = await site.image("v1")
    prefix = image.digest.replace(":", "-")
    for suffix in ("sig", "att", "sbom"):
        await push_artifact(site, None, tag=f"{prefix}.{suffix}", annotations={"kind": suffix})
    referrer_groups = await get_groups(site)
    assert [(group["purpose"], group["referrers"][0]["tag"]) for group in referrer_groups] == [
        ("signature", f"{prefix}.sig"),
        ("sbom", f"{prefix}.sbom"),
        ("attestation", f"{prefix}.att"),
    ]


async def test_attestations_of_buildkit(site: Site) -> None:
    """BuildKit's attestations are entries of the index, and refer to one of its images."""
    image = await site.image()
    layer = await push_file(site, b"{}", "application/vnd.in-toto+json", **{"in-toto.io/predicate-type": SPDX})
    attestation = await push_artifact(site, None, layer)
    annotations = {
        "vnd.docker.reference.type": "attestation-manifest",
        "vnd.docker.reference.digest": image.digest,
    }
    index = index_of([image.descriptor, replace(attestation.descriptor, annotations=annotations)])
    await site.registry.put_manifest(APP, index, [Tag("v1")], by=BY)
    [group] = await get_groups(site)
    [referrer] = group["referrers"]
    assert (group["purpose"], referrer["about"], referrer["digest"]) == ("sbom", image.digest, attestation.digest)
    assert referrer["files"][0]["predicate_type"] == SPDX


async def test_the_purpose_of_a_sigstore_bundle(site: Site) -> None:
    """Sigstore's bundles have the same artifact type for signatures, SBOMs and attestations. Their annotations tell the
    purpose."""
    image = await site.image("v1")
    kind = "application/vnd.dev.sigstore.bundle.v0.3+json"
    for predicate in ("https://sigstore.dev/cosign/sign/v1", "https://slsa.dev/provenance/v1", SPDX):
        annotations = {"dev.sigstore.bundle.predicateType": predicate}
        await push_artifact(site, image.digest, artifactType=kind, annotations=annotations)
    assert [group["purpose"] for group in await get_groups(site)] == ["signature", "sbom", "attestation"]


async def push_and_get_files(site: Site, *files: Descriptor) -> list[dict[str, Any]]:
    """Pushes an artifact with these files, and returns what the API shows of each file."""
    manifest = await push_artifact(site, None, *files, tag="v1")
    document = await site.json(f"{APP}/manifests/v1/files")
    assert document["digest"] == manifest.digest
    listed: list[dict[str, Any]] = document["files"]
    return listed


async def test_only_small_text_files_are_shown(site: Site) -> None:
    """The API shows the text of small files. It does not show the content of large files and of binary files."""
    shown_files = await push_and_get_files(
        site,
        await push_file(site, b'{"a": "<script>"}', "application/json"),
        await push_file(site, "plain <b>文字</b>".encode()),
        await push_file(site, b"\xff\x00"),
        await push_file(site, b"nul \0 nul"),
        await push_file(site, b"x" * (MAX_FILE_BYTES + 1)),
    )
    assert [(each["format"], each["text"], each["present"]) for each in shown_files] == [
        ("json", '{"a": "<script>"}', True),
        ("text", "plain <b>文字</b>", True),
        ("binary", None, True),
        ("binary", None, True),
        ("binary", None, True),
    ]


async def test_in_toto_statements_are_shown(site: Site) -> None:
    """If a file is an envelope with an in-toto statement, the statement is shown. The envelope can be in a bundle.
    Other JSON is not shown as a statement."""
    payload = base64.b64encode(json.dumps({"predicateType": SPDX, "subject": []}).encode()).decode()
    envelope = {"payloadType": "application/vnd.in-toto+json", "payload": payload}
    without_statement: list[Any] = [
        {"payload": "%"},
        {"payload": 1},
        {"dsseEnvelope": []},
        {"payload": "WzFd"},
        [],
        {"payload": ""},
    ]
    files = [
        await push_file(site, json.dumps(each).encode())
        for each in (envelope, {"dsseEnvelope": envelope}, *without_statement)
    ]
    shown_files = await push_and_get_files(site, *files)
    for file_view in shown_files[:2]:
        assert json.loads(file_view["statement"])["predicateType"] == file_view["predicate_type"] == SPDX
    assert {each["statement"] for each in shown_files[2:]} == {None}


def envelope(statement: str) -> bytes:
    return json.dumps({"payload": base64.b64encode(statement.encode()).decode()}).encode()


def nested_object(depth: int) -> str:
    """Returns JSON objects that are nested in each other to this depth."""
    return '{"a":' * (depth - 1) + "{}" + "}" * (depth - 1)


def test_statements_that_are_too_large_are_not_shown() -> None:
    """A statement is not shown if it would be too long with its indentation, for example because it is nested deeply.
    The file itself is shown without changes."""
    assert file_text_of(envelope(nested_object(MAX_STATEMENT_DEPTH))).statement is not None
    long_when_indented = "[" * 25 + ",".join("1" * 5000) + "]" * 25
    for statement in (
        nested_object(MAX_STATEMENT_DEPTH + 1),
        nested_object(7000),
        f'{{"predicateType": "{SPDX}", "a": {long_when_indented}}}',
    ):
        data = envelope(statement)
        assert len(data) < MAX_FILE_BYTES
        file_view = file_text_of(data)
        assert (file_view.text, file_view.statement) == (data.decode(), None)
    assert file_view.predicate_type == SPDX
    longest = file_text_of(envelope('{"a": ["' + '","'.join("x" * 9000) + '"]}')).statement
    assert longest is not None
    assert len(longest) <= MAX_STATEMENT_CHARACTERS


def test_deeply_nested_json_causes_no_error() -> None:
    """A file with very deeply nested JSON is shown as text. No error of the parser reaches the caller."""
    for data in (b"[" * MAX_FILE_BYTES, nested_object(MAX_FILE_BYTES // 6).encode()):
        file_view = file_text_of(data)
        assert (file_view.text, file_view.statement) == (data.decode(), None)


async def test_all_referrers_share_a_text_limit(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The annotations of all referrers of an image together are limited in length."""
    monkeypatch.setattr(bounded_text, "MAX_TOTAL_CHARACTERS", 2_000)
    image = await site.image("v1")
    for number in range(5):
        note = {"note": f"{number}" + "x" * 1_000}
        await push_artifact(site, image.digest, artifactType="x/other", annotations=note)
    [group] = await get_groups(site)
    assert len(group["referrers"]) == 5
    texts = [text for view in group["referrers"] for item in view["annotations"].items() for text in item]
    assert 1_000 < sum(map(len, texts)) < 2_100


async def test_an_index_that_states_wrong_sizes(site: Site) -> None:
    """If an index lists an attestation many times with wrong sizes, the attestation is shown once, with its real
    size."""
    attestation = await push_artifact(site, None, await push_file(site, b"{}"))
    annotations = {"vnd.docker.reference.type": "attestation-manifest"}
    entries = [replace(attestation.descriptor, annotations=annotations, size=size) for size in (1, 2, 1 << 40)]
    await site.registry.put_manifest(APP, index_of(entries), [Tag("v1")], by=BY)
    [group] = await get_groups(site)
    [referrer] = group["referrers"]
    assert (referrer["digest"], referrer["size"]) == (attestation.digest, len(attestation.body))


async def test_a_limited_number_of_files_is_shown(site: Site) -> None:
    """The first ten files of an artifact are shown, and the others are counted."""
    await push_artifact(site, None, *[await push_file(site, b"same")] * 25, tag="v1")
    document = await site.json(f"{APP}/manifests/v1/files")
    assert (len(document["files"]), document["more"]) == (10, 15)


async def test_referrers_need_the_right_to_pull(site: Site) -> None:
    """For an account without the right to pull, the manifest does not exist. An anonymous client gets 401."""
    image = await site.image("v1")
    for route in ("referrers", "files"):
        for reference in ("v1", image.digest):
            assert (await site.get(f"{APP}/manifests/{reference}/{route}", "other")).status == 404
            assert (await site.get(f"{APP}/manifests/{reference}/{route}", None)).status == 401
        assert (await site.get(f"{APP}/manifests/none/{route}")).status == 404
