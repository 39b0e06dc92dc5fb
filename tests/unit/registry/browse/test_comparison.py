"""The API that compares two images of a repository."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from storage.content import Manifest
from storage.names import Tag
from tests.fakes.registry_content import BY, index_of
from tests.unit.registry.browse.conftest import APP, Site


async def get_comparison(site: Site, query: str = "base=v1&other=v2") -> dict[str, Any]:
    document: dict[str, Any] = await site.json(f"{APP}/comparison?{query}")
    return document


def config(architecture: str = "amd64", **fields: Any) -> dict[str, Any]:
    return {"os": "linux", "architecture": architecture, "config": fields}


async def test_layers_and_configs_are_compared(site: Site) -> None:
    """The response has the layers that both images share, the layers of only one image, and the differences of their
    configs."""
    base = config(Env=["A=1", "B=2"], Cmd=["run", "a b"], Labels={"x": "1"}, ExposedPorts={"80/tcp": {}}, User="app")
    other = config(Env=["B=3", "C="], Cmd=["run"], Labels={"x": "1"}, ExposedPorts={"81/tcp": {}})
    first = await site.image("v1", config=base, layers=[b"shared", b"old"])
    second = await site.image("v2", config=other, layers=[b"shared", b"new", b"newer"])
    comparison = await get_comparison(site)
    assert (comparison["base"]["digest"], comparison["other"]["digest"]) == (first.digest, second.digest)
    assert [layer["digest"] for layer in comparison["shared_layers"]] == [first.layers[0].digest]
    assert [layer["digest"] for layer in comparison["base_layers"]] == [first.layers[1].digest]
    assert [layer["digest"] for layer in comparison["other_layers"]] == [layer.digest for layer in second.layers[1:]]
    assert comparison["shared_bytes"] == len("shared")
    assert [(each["field"], each["name"], each["base"], each["other"]) for each in comparison["changes"]] == [
        ("user", "", "app", ""),
        ("cmd", "", "run 'a b'", "run"),
        ("exposed_ports", "80/tcp", "", None),
        ("exposed_ports", "81/tcp", None, ""),
        ("env", "A", "1", None),
        ("env", "B", "2", "3"),
        ("env", "C", None, ""),
    ]
    same = await get_comparison(site, "base=v1&other=v1")
    assert (same["base_layers"], same["other_layers"], same["changes"]) == ([], [], [])


async def push_index(site: Site, tag: str, *architectures: str) -> list[Manifest]:
    images = [await site.image(config=config(each), layers=[f"{tag} {each}".encode()]) for each in architectures]
    entries = [
        replace(image.descriptor, platform={"os": "linux", "architecture": architecture})
        for image, architecture in zip(images, architectures, strict=True)
    ]
    await site.registry.put_manifest(APP, index_of(entries, annotations={"tag": tag}), [Tag(tag)], by=BY)
    return images


async def test_images_of_one_platform_are_compared(site: Site) -> None:
    """If the tags are indexes, their images for one platform are compared. This is the platform in the request, or else
    the usual one (linux/amd64), or else one that both indexes have."""
    first = await push_index(site, "v1", "amd64", "arm64")
    second = await push_index(site, "v2", "arm64", "s390x")
    third = await push_index(site, "v3", "arm64", "amd64")
    comparison = await get_comparison(site)
    assert (comparison["base"]["digest"], comparison["other"]["digest"]) == (first[1].digest, second[0].digest)
    comparison = await get_comparison(site, "base=v1&other=v3")
    assert (comparison["base"]["digest"], comparison["other"]["digest"]) == (first[0].digest, third[1].digest)
    comparison = await get_comparison(site, "base=v1&other=v3&platform=linux/arm64")
    assert (comparison["base"]["digest"], comparison["other"]["digest"]) == (first[1].digest, third[0].digest)
    await push_index(site, "v4", "riscv64")
    for query in ("base=v1&other=v4", "base=v1&other=v3&platform=linux/s390x", "base=v1&other=none"):
        assert (await site.get(f"{APP}/comparison?{query}")).status == 404


async def test_a_config_that_is_not_json(site: Site) -> None:
    """If a config is not JSON, only the layers are compared."""
    await site.image("v1", config=b"no JSON", layers=[b"shared"])
    await site.image("v2", layers=[b"shared"])
    comparison = await get_comparison(site)
    assert (comparison["base"]["has_config"], len(comparison["shared_layers"]), comparison["changes"]) == (False, 1, [])
