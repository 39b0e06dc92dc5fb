"""Which entries of an index match a platform."""

from __future__ import annotations

import pytest

from registry.mirror.warm.targets import Platform, choose_manifests, platform_name
from storage.content import OCI_MANIFEST, Descriptor, digest_of


def entry(text: str) -> Descriptor:
    platform = dict(zip(("os", "architecture", "variant"), text.split("/"), strict=False)) if text else None
    return Descriptor(OCI_MANIFEST, digest_of(text.encode()), 2, platform=platform)


HUB = [
    entry(text)
    for text in (
        "linux/amd64",
        "linux/arm/v6",
        "linux/arm/v7",
        "linux/arm64/v8",
        "windows/amd64",
        "unknown/unknown",
        "",
    )
]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("linux/amd64", ["linux/amd64"]),
        ("linux/amd64/v1", ["linux/amd64"]),
        ("linux/arm64", ["linux/arm64/v8"]),
        ("linux/arm64/v8", ["linux/arm64/v8"]),
        ("linux/arm", ["linux/arm/v7"]),
        ("linux/arm/v6", ["linux/arm/v6"]),
        ("windows/amd64", ["windows/amd64"]),
        ("linux/s390x", []),
        ("linux/arm/v5", []),
    ],
)
def test_the_entries_of_a_platform(wanted: str, found: list[str]) -> None:
    """A missing variant, in the requested platform or in the index, means the usual variant."""
    chosen, missing = choose_manifests(HUB, [Platform.parse(wanted)])
    assert [platform_name(each) for each in chosen] == found
    assert [str(each) for each in missing] == ([] if found else [wanted])


def test_only_unusual_variants() -> None:
    """If an index has only unusual variants of a platform, all of them match."""
    chosen, missing = choose_manifests([entry("linux/arm/v5"), entry("linux/arm/v6")], [Platform.parse("linux/arm")])
    assert [platform_name(each) for each in chosen] == ["linux/arm/v5", "linux/arm/v6"]
    assert not missing


def test_several_platforms_keep_the_order_of_the_index() -> None:
    """Each entry is returned once, in the index's order."""
    wanted = [Platform.parse(text) for text in ("linux/arm64", "linux/amd64", "linux/amd64/v1")]
    assert [platform_name(each) for each in choose_manifests(HUB, wanted)[0]] == ["linux/amd64", "linux/arm64/v8"]


@pytest.mark.parametrize("text", ["", "linux", "linux/", "Linux/amd64", "linux/arm/v7/x", "linux amd64"])
def test_what_is_no_platform(text: str) -> None:
    """A text that is not a platform is refused, with an example in the error."""
    with pytest.raises(ValueError, match="is not a platform like linux/amd64"):
        Platform.parse(text)


def test_this_machine() -> None:
    """This machine's platform can be written as text and parsed again."""
    assert Platform.parse(str(Platform.of_machine())) == Platform.of_machine()
