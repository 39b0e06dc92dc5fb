"""The API that shows one manifest in detail."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from registry.browse.image_config import HistoryEntry
from registry.browse.manifest_details import list_build_steps, size_parts
from storage.content import OCI_MANIFEST
from storage.names import Tag
from tests.fakes.registry_content import BY, descriptor_of, image_of, index_of, push_blob
from tests.unit.registry.browse.conftest import APP, Site


async def details(site: Site, reference: str = "v1", query: str = "") -> dict[str, Any]:
    """Returns the details of a manifest."""
    document: dict[str, Any] = await site.json(f"{APP}/manifests/{reference}/details{query}")
    return document


def entry(command: str, *, is_empty: bool = False) -> HistoryEntry:
    return HistoryEntry(command, None, "", is_empty)


async def test_the_details_of_an_image(site: Site) -> None:
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
    view = await details(site)
    assert (view["kind"], view["digest"], view["size"]) == ("image", image.digest, len(image.body))
    assert (view["tags"], view["annotations"], view["subject"]) == (["same", "v1"], {"note": "<i>"}, None)
    assert view["raw"].encode() == image.body
    image_view = view["image"]
    assert (image_view["platform"], image_view["config"]["env"], image_view["config"]["labels"]) == (
        "linux/amd64",
        ["A=1"],
        {"org": "<b>"},
    )
    assert [(step["command"], step["layer"] and step["layer"]["digest"]) for step in image_view["steps"]] == [
        ("COPY a /", image.layers[0].digest),
        ('CMD ["a"]', None),
        ("RUN make", image.layers[1].digest),
    ]
    assert sum(part["size"] for part in image_view["parts"]) == image_view["size"]
    assert (await details(site, image.digest))["tags"] == ["same", "v1"]
    raw = await site.get(f"{APP}/manifests/v1/raw")
    assert (raw.body, raw["docker-content-digest"]) == (image.body, image.digest)
    assert json.loads((await site.get(f"{APP}/manifests/v1/config")).body) == config


async def test_the_details_of_an_index(site: Site) -> None:
    """If the tag is an index, the image of the usual platform (linux/amd64) is shown, or the image that the request
    names by its platform or digest."""
    images = [await site.image(config={"os": "linux", "architecture": arch}) for arch in ("arm64", "amd64")]
    entries = [
        replace(image.descriptor, platform={"os": "linux", "architecture": arch})
        for image, arch in zip(images, ("arm64", "amd64"), strict=True)
    ]
    await site.registry.put_manifest(APP, index_of(entries), [Tag("v1")], by=BY)
    assert (await details(site))["image"]["digest"] == images[1].digest
    for requested in ("linux/arm64", images[0].digest):
        assert (await details(site, query=f"?platform={requested}"))["image"]["digest"] == images[0].digest
    assert (await site.get(f"{APP}/manifests/v1/details?platform=linux/s390x")).status == 404
    assert (await site.get(f"{APP}/manifests/v1/config")).status == 404


async def test_an_index_without_manifests(site: Site) -> None:
    """An index without manifests has no platforms, and no image is shown."""
    await site.registry.put_manifest(APP, index_of([]), [Tag("v1")], by=BY)
    view = await details(site)
    assert (view["kind"], view["platforms"], view["image"]) == ("index", [], None)


async def test_the_details_of_an_artifact(site: Site) -> None:
    """An artifact is shown with the names of its files, and without an image."""
    blob = await push_blob(site.registry, APP, b"report")
    config = await push_blob(site.registry, APP, b"{}")
    titled = replace(blob, annotations={"org.opencontainers.image.title": "<report>.txt"})
    artifact = image_of(replace(config, media_type="application/vnd.oci.empty.v1+json"), [titled], artifactType="a/b")
    await site.registry.put_manifest(APP, artifact, [Tag("v1")], by=BY)
    view = await details(site)
    assert (view["kind"], view["artifact_type"], view["image"]) == ("artifact", "a/b", None)
    assert [(file["title"], file["layer"]["size"]) for file in view["files"]] == [("<report>.txt", 6)]


async def test_an_image_with_many_layers(site: Site) -> None:
    """An image with five hundred layers is shown. Its size is split into parts: the twelve largest layers, the config,
    and all other layers together."""
    await site.image("v1", layers=[b"a", b"bb", b"ccc", b"dddd", b"eeeee"] * 100)
    image_view = (await details(site))["image"]
    assert (len(image_view["steps"]), image_view["more_steps"]) == (500, 0)
    assert [part["kind"] for part in image_view["parts"]] == [*["layer"] * 12, "config", "rest"]
    assert sum(part["size"] for part in image_view["parts"]) == image_view["size"]


async def test_a_large_manifest(site: Site) -> None:
    """A manifest of a megabyte is shown without its text. A separate request returns the text."""
    await site.image("v1", annotations={f"a{number}": "x" * 5000 for number in range(250)})
    view = await details(site)
    assert (view["raw"], len(view["annotations"]), view["annotations_truncated"]) == (None, 64, True)
    assert len((await site.get(f"{APP}/manifests/v1/raw")).body) > 1_250_000


async def test_a_config_that_is_not_json(site: Site) -> None:
    """If the config is not JSON, the layers are shown without commands."""
    await site.image("v1", config=b"no JSON", layers=[b"a"])
    image_view = (await details(site))["image"]
    assert (image_view["config"], [step["command"] for step in image_view["steps"]]) == (None, [""])
    assert (await site.get(f"{APP}/manifests/v1/config")).body == b"no JSON"


async def test_unknown_manifests_are_404(site: Site) -> None:
    """Each route answers 404 for an unknown tag or digest, and 400 for an invalid tag."""
    await site.image("v1")
    for reference in ("none", descriptor_of(b"none").digest):
        for route in ("details", "raw", "config"):
            assert (await site.get(f"{APP}/manifests/{reference}/{route}")).status == 404
    assert (await site.get(f"{APP}/manifests/-/details")).status == 400


def test_histories_that_do_not_match_the_layers() -> None:
    """If there are more layers than history entries, the further layers come last, without a command. If there are more
    entries than layers, the further entries have no layer."""
    layers = [descriptor_of(text, OCI_MANIFEST) for text in (b"a", b"b")]
    steps = list_build_steps(layers, [entry("ENV", is_empty=True), entry("COPY")], {layers[1].digest})
    assert [(step.command, step.layer and step.layer.present) for step in steps] == [
        ("ENV", None),
        ("COPY", False),
        ("", True),
    ]
    assert [step.layer is None for step in list_build_steps(layers[:1], [entry("a"), entry("b")], set())] == [
        False,
        True,
    ]


def test_parts_of_the_size() -> None:
    """The parts of the size begin with the largest layer. Each layer has the number of its step in the history."""
    layers = [descriptor_of(text) for text in (b"a", b"bbb")]
    parts = size_parts(list_build_steps(layers, [entry("x", is_empty=True)], set()), 2, 10)
    assert [(part.kind, part.size, part.step) for part in parts] == [
        ("layer", 3, 2),
        ("layer", 1, 1),
        ("config", 2, None),
        ("rest", 4, None),
    ]
