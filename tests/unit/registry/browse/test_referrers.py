"""The API that lists what refers to a manifest."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest

from registry.browse import bounded_text
from registry.browse.file_texts import MAX_FILE_BYTES, MAX_STATEMENT_CHARACTERS, MAX_STATEMENT_DEPTH, read_file
from storage.content import Descriptor, Manifest
from storage.names import Digest, Tag
from tests.fakes.registry_content import BY, image_of, index_of, push_blob
from tests.unit.registry.browse.conftest import APP, Site

EMPTY = "application/vnd.oci.empty.v1+json"
SPDX = "https://spdx.dev/Document"


async def artifact(site: Site, subject: Digest | None, *files: Descriptor, tag: str = "", **fields: Any) -> Manifest:
    """Pushes an artifact with these files."""
    config = replace(await push_blob(site.registry, APP, b"{}"), media_type=EMPTY)
    manifest = image_of(config, files, subject=subject, **fields)
    await site.registry.put_manifest(APP, manifest, [Tag(tag)] if tag else [], by=BY)
    return manifest


async def file(site: Site, data: bytes, media_type: str = "text/plain", **annotations: str) -> Descriptor:
    return replace(await push_blob(site.registry, APP, data), media_type=media_type, annotations=annotations or None)


async def groups(site: Site, reference: str = "v1") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await site.json(f"{APP}/manifests/{reference}/referrers"))["groups"]
    return found


async def test_groups(site: Site) -> None:
    """Signatures come first, then SBOMs, attestations and other artifacts, in the forms that `oras attach` pushes."""
    image = await site.image("v1")
    for kind in ("x/other", "application/spdx+json", "application/vnd.cncf.notary.signature", "x/other"):
        titled = await file(site, b"text", **{"org.opencontainers.image.title": "<a>.txt"})
        note = str(len(await groups(site)) + 10 * len(kind))
        await artifact(site, image.digest, titled, artifactType=kind, annotations={"note": note})
    await artifact(site, image.digest, artifactType="application/vnd.in-toto+json")
    found = await groups(site)
    assert [(group["purpose"], group["artifact_type"], len(group["referrers"])) for group in found] == [
        ("signature", "application/vnd.cncf.notary.signature", 1),
        ("sbom", "application/spdx+json", 1),
        ("attestation", "application/vnd.in-toto+json", 1),
        ("other", "x/other", 2),
    ]
    [referrer] = found[0]["referrers"]
    assert (referrer["about"], referrer["tag"], referrer["files"][0]["title"]) == (image.digest, None, "<a>.txt")
    assert await groups(site, image.digest) == found


async def test_cosigns_old_tags(site: Site) -> None:
    image = await site.image("v1")
    prefix = image.digest.replace(":", "-")
    for suffix in ("sig", "att", "sbom"):
        await artifact(site, None, tag=f"{prefix}.{suffix}", annotations={"kind": suffix})
    found = await groups(site)
    assert [(group["purpose"], group["referrers"][0]["tag"]) for group in found] == [
        ("signature", f"{prefix}.sig"),
        ("sbom", f"{prefix}.sbom"),
        ("attestation", f"{prefix}.att"),
    ]


async def test_attestations_of_buildkit(site: Site) -> None:
    """BuildKit's attestations are entries of the index, and refer to one of its images."""
    image = await site.image()
    layer = await file(site, b"{}", "application/vnd.in-toto+json", **{"in-toto.io/predicate-type": SPDX})
    attestation = await artifact(site, None, layer)
    annotations = {
        "vnd.docker.reference.type": "attestation-manifest",
        "vnd.docker.reference.digest": image.digest,
    }
    index = index_of([image.descriptor, replace(attestation.descriptor, annotations=annotations)])
    await site.registry.put_manifest(APP, index, [Tag("v1")], by=BY)
    [group] = await groups(site)
    [referrer] = group["referrers"]
    assert (group["purpose"], referrer["about"], referrer["digest"]) == ("sbom", image.digest, attestation.digest)
    assert referrer["files"][0]["predicate_type"] == SPDX


async def test_bundles_are_what_they_state(site: Site) -> None:
    """Sigstore's bundles have the same artifact type for signatures and attestations, so their annotations tell which
    they are."""
    image = await site.image("v1")
    kind = "application/vnd.dev.sigstore.bundle.v0.3+json"
    for predicate in ("https://sigstore.dev/cosign/sign/v1", "https://slsa.dev/provenance/v1", SPDX):
        annotations = {"dev.sigstore.bundle.predicateType": predicate}
        await artifact(site, image.digest, artifactType=kind, annotations=annotations)
    assert [group["purpose"] for group in await groups(site)] == ["signature", "sbom", "attestation"]


async def contents(site: Site, *files: Descriptor) -> list[dict[str, Any]]:
    manifest = await artifact(site, None, *files, tag="v1")
    found = await site.json(f"{APP}/manifests/v1/files")
    assert found["digest"] == manifest.digest
    listed: list[dict[str, Any]] = found["files"]
    return listed


async def test_files(site: Site) -> None:
    """The texts of small files are shown, those of large files and of binary files are not."""
    found = await contents(
        site,
        await file(site, b'{"a": "<script>"}', "application/json"),
        await file(site, "plain <b>文字</b>".encode()),
        await file(site, b"\xff\x00"),
        await file(site, b"nul \0 nul"),
        await file(site, b"x" * (MAX_FILE_BYTES + 1)),
    )
    assert [(each["format"], each["text"], each["present"]) for each in found] == [
        ("json", '{"a": "<script>"}', True),
        ("text", "plain <b>文字</b>", True),
        ("binary", None, True),
        ("binary", None, True),
        ("binary", None, True),
    ]


async def test_statements(site: Site) -> None:
    """The statement in an envelope is shown, also if the envelope is in a bundle. Content that is no statement does no
    harm."""
    payload = base64.b64encode(json.dumps({"predicateType": SPDX, "subject": []}).encode()).decode()
    envelope = {"payloadType": "application/vnd.in-toto+json", "payload": payload}
    odd: list[Any] = [{"payload": "%"}, {"payload": 1}, {"dsseEnvelope": []}, {"payload": "WzFd"}, [], {"payload": ""}]
    files = [await file(site, json.dumps(each).encode()) for each in (envelope, {"dsseEnvelope": envelope}, *odd)]
    found = await contents(site, *files)
    for shown in found[:2]:
        assert json.loads(shown["statement"])["predicateType"] == shown["predicate_type"] == SPDX
    assert {each["statement"] for each in found[2:]} == {None}


def envelope(statement: str) -> bytes:
    return json.dumps({"payload": base64.b64encode(statement.encode()).decode()}).encode()


def nested(depth: int) -> str:
    return '{"a":' * (depth - 1) + "{}" + "}" * (depth - 1)


def test_statements_that_would_become_large() -> None:
    """A statement is not shown if it would be too long with its indentation, for example because it is nested deeply.
    The file itself is shown without changes."""
    assert read_file(envelope(nested(MAX_STATEMENT_DEPTH))).statement is not None
    wide = "[" * 25 + ",".join("1" * 5000) + "]" * 25
    for statement in (nested(MAX_STATEMENT_DEPTH + 1), nested(7000), f'{{"predicateType": "{SPDX}", "a": {wide}}}'):
        data = envelope(statement)
        assert len(data) < MAX_FILE_BYTES
        shown = read_file(data)
        assert (shown.text, shown.statement) == (data.decode(), None)
    assert shown.predicate_type == SPDX
    longest = read_file(envelope('{"a": ["' + '","'.join("x" * 9000) + '"]}')).statement
    assert longest is not None
    assert len(longest) <= MAX_STATEMENT_CHARACTERS


def test_texts_that_nest_very_deeply() -> None:
    """Deeply nested JSON causes no error, whatever the parser raises."""
    for data in (b"[" * MAX_FILE_BYTES, nested(MAX_FILE_BYTES // 6).encode()):
        shown = read_file(data)
        assert (shown.text, shown.statement) == (data.decode(), None)


async def test_one_budget_for_all_referrers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts of all referrers of an image share one budget."""
    monkeypatch.setattr(bounded_text, "MAX_TOTAL_CHARACTERS", 2_000)
    image = await site.image("v1")
    for number in range(5):
        note = {"note": f"{number}" + "x" * 1_000}
        await artifact(site, image.digest, artifactType="x/other", annotations=note)
    [group] = await groups(site)
    assert len(group["referrers"]) == 5
    texts = [text for view in group["referrers"] for item in view["annotations"].items() for text in item]
    assert 1_000 < sum(map(len, texts)) < 2_100


async def test_an_index_that_states_wrong_sizes(site: Site) -> None:
    """If an index lists an attestation many times with wrong sizes, the attestation is shown once, with its real
    size."""
    attestation = await artifact(site, None, await file(site, b"{}"))
    annotations = {"vnd.docker.reference.type": "attestation-manifest"}
    entries = [replace(attestation.descriptor, annotations=annotations, size=size) for size in (1, 2, 1 << 40)]
    await site.registry.put_manifest(APP, index_of(entries), [Tag("v1")], by=BY)
    [group] = await groups(site)
    [referrer] = group["referrers"]
    assert (referrer["digest"], referrer["size"]) == (attestation.digest, len(attestation.body))


async def test_many_files(site: Site) -> None:
    await artifact(site, None, *[await file(site, b"same")] * 25, tag="v1")
    found = await site.json(f"{APP}/manifests/v1/files")
    assert (len(found["files"]), found["more"]) == (10, 15)


async def test_rights(site: Site) -> None:
    image = await site.image("v1")
    for route in ("referrers", "files"):
        for reference in ("v1", image.digest):
            assert (await site.get(f"{APP}/manifests/{reference}/{route}", "other")).status == 404
            assert (await site.get(f"{APP}/manifests/{reference}/{route}", None)).status == 401
        assert (await site.get(f"{APP}/manifests/none/{route}")).status == 404
