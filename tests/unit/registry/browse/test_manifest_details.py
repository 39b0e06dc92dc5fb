"""The API that shows one manifest in detail."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from registry.browse.image_config import HistoryEntry
from registry.browse.manifest_details import build_steps, size_parts
from storage.content import OCI_MANIFEST
from storage.names import Tag
from tests.fakes.registry_content import BY, descriptor_of, image_of, index_of, push_blob
from tests.unit.registry.browse.conftest import APP, Site


async def details(site: Site, reference: str = "v1", query: str = "") -> dict[str, Any]:
    found: dict[str, Any] = await site.json(f"{APP}/manifests/{reference}/details{query}")
    return found


def entry(command: str, *, is_empty: bool = False) -> HistoryEntry:
    return HistoryEntry(command, None, "", is_empty)


async def test_an_image(site: Site) -> None:
    """Each step of the history has its command and its layer. Steps without a layer are listed as well."""
    config = {
        "os": "linux",
        "architecture": "amd64",
        "config": {"Env": ["A=1"], "Labels": {"org": "<b>"}},
        "history": [
            {"created_by": "COPY a / # buildkit", "comment": "buildkit"},
            {"created_by": 'CMD ["a"]', "empty_layer": True},
            {"created_by": "RUN /bin/sh -c make # buildkit"},
        ],
    }
    image = await site.image("v1", "same", config=config, layers=[b"first", b"second"], annotations={"note": "<i>"})
    found = await details(site)
    assert (found["kind"], found["digest"], found["size"]) == ("image", image.digest, len(image.body))
    assert (found["tags"], found["annotations"], found["subject"]) == (["same", "v1"], {"note": "<i>"}, None)
    assert found["raw"].encode() == image.body
    shown = found["image"]
    assert (shown["platform"], shown["config"]["env"], shown["config"]["labels"]) == (
        "linux/amd64",
        ["A=1"],
        {"org": "<b>"},
    )
    assert [(step["command"], step["layer"] and step["layer"]["digest"]) for step in shown["steps"]] == [
        ("COPY a /", image.layers[0].digest),
        ('CMD ["a"]', None),
        ("RUN make", image.layers[1].digest),
    ]
    assert sum(part["size"] for part in shown["parts"]) == shown["size"]
    assert (await details(site, image.digest))["tags"] == ["same", "v1"]
    raw = await site.get(f"{APP}/manifests/v1/raw")
    assert (raw.body, raw["docker-content-digest"]) == (image.body, image.digest)
    assert json.loads((await site.get(f"{APP}/manifests/v1/config")).body) == config


async def test_an_index(site: Site) -> None:
    """Of an index, the usual platform is shown, or the one that the request names by platform or digest."""
    images = [await site.image(config={"os": "linux", "architecture": arch}) for arch in ("arm64", "amd64")]
    entries = [
        replace(image.descriptor, platform={"os": "linux", "architecture": arch})
        for image, arch in zip(images, ("arm64", "amd64"), strict=True)
    ]
    await site.registry.put_manifest(APP, index_of(entries), [Tag("v1")], by=BY)
    assert (await details(site))["image"]["digest"] == images[1].digest
    for wanted in ("linux/arm64", images[0].digest):
        assert (await details(site, query=f"?platform={wanted}"))["image"]["digest"] == images[0].digest
    assert (await site.get(f"{APP}/manifests/v1/details?platform=linux/s390x")).status == 404
    assert (await site.get(f"{APP}/manifests/v1/config")).status == 404


async def test_an_index_without_manifests(site: Site) -> None:
    await site.registry.put_manifest(APP, index_of([]), [Tag("v1")], by=BY)
    found = await details(site)
    assert (found["kind"], found["platforms"], found["image"]) == ("index", [], None)


async def test_an_artifact(site: Site) -> None:
    """An artifact is shown with the names of its files, and without an image."""
    blob = await push_blob(site.registry, APP, b"report")
    config = await push_blob(site.registry, APP, b"{}")
    titled = replace(blob, annotations={"org.opencontainers.image.title": "<report>.txt"})
    artifact = image_of(replace(config, media_type="application/vnd.oci.empty.v1+json"), [titled], artifactType="a/b")
    await site.registry.put_manifest(APP, artifact, [Tag("v1")], by=BY)
    found = await details(site)
    assert (found["kind"], found["artifact_type"], found["image"]) == ("artifact", "a/b", None)
    assert [(file["title"], file["layer"]["size"]) for file in found["files"]] == [("<report>.txt", 6)]


async def test_large_images(site: Site) -> None:
    """An image with five hundred layers is shown. The parts of its size are the largest layers, and all others together
    as one part."""
    await site.image("v1", layers=[b"a", b"bb", b"ccc", b"dddd", b"eeeee"] * 100)
    shown = (await details(site))["image"]
    assert (len(shown["steps"]), shown["more_steps"]) == (500, 0)
    assert [part["kind"] for part in shown["parts"]] == [*["layer"] * 12, "config", "rest"]
    assert sum(part["size"] for part in shown["parts"]) == shown["size"]


async def test_a_large_manifest(site: Site) -> None:
    """A manifest of a megabyte is shown without its text, which a separate request returns."""
    await site.image("v1", annotations={f"a{number}": "x" * 5000 for number in range(250)})
    found = await details(site)
    assert (found["raw"], len(found["annotations"]), found["annotations_truncated"]) == (None, 64, True)
    assert len((await site.get(f"{APP}/manifests/v1/raw")).body) > 1_250_000


async def test_a_config_that_is_no_json(site: Site) -> None:
    """If the config is not JSON, the layers are shown without commands."""
    await site.image("v1", config=b"no JSON", layers=[b"a"])
    shown = (await details(site))["image"]
    assert (shown["config"], [step["command"] for step in shown["steps"]]) == (None, [""])
    assert (await site.get(f"{APP}/manifests/v1/config")).body == b"no JSON"


async def test_unknown(site: Site) -> None:
    await site.image("v1")
    for reference in ("none", descriptor_of(b"none").digest):
        for route in ("details", "raw", "config"):
            assert (await site.get(f"{APP}/manifests/{reference}/{route}")).status == 404
    assert (await site.get(f"{APP}/manifests/-/details")).status == 400


def test_histories_that_do_not_fit_the_layers() -> None:
    """Layers without an entry in the history follow the others, without a command. Entries without a layer have
    none."""
    layers = [descriptor_of(text, OCI_MANIFEST) for text in (b"a", b"b")]
    steps = build_steps(layers, [entry("ENV", is_empty=True), entry("COPY")], {layers[1].digest})
    assert [(step.command, step.layer and step.layer.present) for step in steps] == [
        ("ENV", None),
        ("COPY", False),
        ("", True),
    ]
    assert [step.layer is None for step in build_steps(layers[:1], [entry("a"), entry("b")], set())] == [False, True]


def test_parts_of_the_size() -> None:
    """The parts of the size begin with the largest layer, and name its step."""
    layers = [descriptor_of(text) for text in (b"a", b"bbb")]
    parts = size_parts(build_steps(layers, [entry("x", is_empty=True)], set()), 2, 10)
    assert [(part.kind, part.size, part.step) for part in parts] == [
        ("layer", 3, 2),
        ("layer", 1, 1),
        ("config", 2, None),
        ("rest", 4, None),
    ]
