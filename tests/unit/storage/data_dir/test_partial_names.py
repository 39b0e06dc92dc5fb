"""The names of the files of partial blobs, that is, of blobs that are being downloaded."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.data_dir.layout import Layout
from storage.names import Digest

SHA256, SHA512 = Digest(f"sha256:{'a' * 64}"), Digest(f"sha512:{'a' * 128}")
LONG_SOURCE = "u" * 100 + "@separate"
"""The longest source: the upstream with the longest name, and the suffix for a download apart from others."""
LARGEST_SIZE = 2**63 - 1
NAME_MAX = 255
"""Longest name of a file on Linux file systems, in bytes."""


@pytest.mark.parametrize(
    ("digest", "size", "source", "name"),
    [
        (SHA256, 7, "", f"sha256-{'a' * 64}.7"),
        (SHA256, 7, "docker.io", f"docker.io~sha256-{'a' * 64}.7"),
        (SHA256, LARGEST_SIZE, LONG_SOURCE, f"{LONG_SOURCE}~sha256-{'a' * 64}.{LARGEST_SIZE}"),
        (SHA512, 10**7 - 1, "u" * 105, f"{'u' * 105}~sha512-{'a' * 128}.9999999"),
    ],
)
def test_names_that_fit_have_the_source(digest: Digest, size: int, source: str, name: str) -> None:
    """A name has the source if the names of the files fit into `NAME_MAX` bytes. These are the names that earlier
    versions gave, so downloads of an earlier version are continued."""
    assert Layout.partial_name(digest, size, source) == name


@pytest.mark.parametrize("source", ["u" * 94, "u" * 100, LONG_SOURCE, "é" * 60])
def test_long_source_is_hashed(tmp_path: Path, source: str) -> None:
    """If a name would be too long, it has a hash of the source instead. It is always the same for the same source, has
    the digest, and differs from the names of all other sources, also of one that is named like the hash."""
    layout = Layout(tmp_path)
    name = layout.partial_name(SHA512, LARGEST_SIZE, source)
    assert name == layout.partial_name(SHA512, LARGEST_SIZE, source)
    for path in (layout.partial_data(name), layout.partial_state(name)):
        assert len(path.name.encode()) <= NAME_MAX
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        assert layout.parse_partial_file(path.name) == (name, SHA512)
    others = [source[:-1] + "v", source + "v", name.partition("~")[0].removeprefix("@"), ""]
    assert name not in [layout.partial_name(SHA512, LARGEST_SIZE, other) for other in others]


async def test_blob_of_an_upstream_with_a_long_name_can_be_downloaded(tmp_path: Path) -> None:
    """A partial blob with a digest of sha512 can be claimed for the upstream with the longest name. It is found by
    another process, and deleted when it has expired."""
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path) as store:
        with closing(await store.partials.claim(SHA512, 1_000_000, LONG_SOURCE)) as partial:
            assert partial.is_owner
            assert [path.name[0] for path in (tmp_path / "partials").iterdir()] == ["@", "@"]
            assert await store.partials.list_downloads() == {SHA512}
        assert [expired.digest for expired in await store.partials.expire(float("inf"))] == [SHA512]
    assert list((tmp_path / "partials").iterdir()) == []
