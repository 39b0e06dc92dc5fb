"""Which manifests of an image index are chosen for a platform such as linux/arm64/v8."""

from __future__ import annotations

import pytest

from registry.mirror.warm.targets import Platform, choose_manifests, platform_name
from storage.content import OCI_MANIFEST, Descriptor, digest_of


def index_entry(text: str) -> Descriptor:
    """Returns an entry of an index for the platform "os/architecture/variant"; without a platform if `text` is
    empty."""
    platform = dict(zip(("os", "architecture", "variant"), text.split("/"), strict=False)) if text else None
    return Descriptor(OCI_MANIFEST, digest_of(text.encode()), 2, platform=platform)


INDEX_ENTRIES = [
    index_entry(text)
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
    ("platform", "expected"),
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
def test_entries_for_a_platform(platform: str, expected: list[str]) -> None:
    """A platform without a variant, in the request or in the index, means the usual variant of its architecture."""
    chosen, missing = choose_manifests(INDEX_ENTRIES, [Platform.parse(platform)])
    assert [platform_name(each) for each in chosen] == expected
    assert [str(each) for each in missing] == ([] if expected else [platform])


def test_only_unusual_variants() -> None:
    """If an index has only unusual variants of a platform, a request without a variant matches all of them."""
    chosen, missing = choose_manifests(
        [index_entry("linux/arm/v5"), index_entry("linux/arm/v6")], [Platform.parse("linux/arm")]
    )
    assert [platform_name(each) for each in chosen] == ["linux/arm/v5", "linux/arm/v6"]
    assert not missing


def test_several_platforms_keep_the_order_of_the_index() -> None:
    """If several platforms are requested, each matching entry is returned once, in the order of the index."""
    platforms = [Platform.parse(text) for text in ("linux/arm64", "linux/amd64", "linux/amd64/v1")]
    assert [platform_name(each) for each in choose_manifests(INDEX_ENTRIES, platforms)[0]] == [
        "linux/amd64",
        "linux/arm64/v8",
    ]


@pytest.mark.parametrize("text", ["", "linux", "linux/", "Linux/amd64", "linux/arm/v7/x", "linux amd64"])
def test_malformed_platforms_are_refused(text: str) -> None:
    """A text that is not a platform is refused, with an example in the error."""
    with pytest.raises(ValueError, match="is not a platform like linux/amd64"):
        Platform.parse(text)


def test_platform_of_this_machine() -> None:
    """The platform of this machine, written as text, can be parsed again."""
    assert Platform.parse(str(Platform.of_machine())) == Platform.of_machine()
