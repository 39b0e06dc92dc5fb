"""`entrepot import FILE` refuses a damaged or hostile file with an error that names the file and what is wrong."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry.upkeep.images.file_sources import open_source
from registry.upkeep.images.found_images import FoundContent, find_images
from registry.upkeep.images.image_writers import LayoutDirectory
from storage.backups import ImageFileFailed
from tests.fakes.client_images import image, layer, noise, write_archive
from tests.fakes.commands import entrepot, error_line

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DIGEST = f"sha256:{'a' * 64}"
DEEP = b"[" * 200_000
"""JSON that is nested more deeply than the parser allows."""
LONG_NUMBER = b"9" * 5000
"""A number with more digits than the parser allows."""

NO_TEXTS: list[Any] = [5, True, ["x"], {"x": "y"}]
NO_LISTS_OF_TEXTS: list[Any] = [7, {"a": 1}, "a/b:1", [5], [{}], [["a"]], [None]]
"""Values of other types than the formats require."""


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    """Writes a tar archive with these files."""
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def layout(index: bytes) -> dict[str, bytes]:
    """Returns the files of an OCI image layout with this `index.json`."""
    return {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": index}


def layout_entry(**more: Any) -> dict[str, bytes]:
    """Returns the files of an OCI image layout with one entry, which has these fields in addition."""
    return layout(json.dumps({"manifests": [{"mediaType": MANIFEST, "digest": DIGEST, "size": 3, **more}]}).encode())


def docker(images: Any, config: bytes = b'{"rootfs":{"diff_ids":[]}}') -> dict[str, bytes]:
    """Returns the files of an archive of `docker save` with this list of images and this config."""
    return {"manifest.json": json.dumps(images).encode(), "c.json": config}


def docker_image(config: bytes = b'{"rootfs":{"diff_ids":[]}}', **more: Any) -> dict[str, bytes]:
    """Returns the files of an archive of `docker save` with one image, which has these fields in addition."""
    return docker([{"Config": "c.json", "Layers": [], "RepoTags": ["a/b:1"], **more}], config)


def find(path: Path) -> FoundContent:
    with open_source(path) as source:
        return find_images(source)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        *((layout(text), "index.json is not JSON") for text in (DEEP, LONG_NUMBER, b"\xff", b"{")),
        *((layout(text), "index.json is not valid") for text in (b"[]", b"7", b"null", b'{"manifests":7}')),
        (layout(b'{"manifests":[7]}'), "index.json is not valid"),
        (layout(b'{"manifests":{"a":1}}'), "index.json is not valid"),
        (layout_entry(mediaType=["x"]), "index.json is not valid"),
        (layout_entry(digest=7), "index.json is not valid"),
        (layout_entry(digest=["x"]), "index.json is not valid"),
        *((layout_entry(annotations=value), "index.json is not valid") for value in ("x", ["x"], 7)),
        *(
            (layout_entry(annotations={name: value}), "index.json is not valid: the annotation .* is no text")
            for name in ("io.containerd.image.name", "org.opencontainers.image.ref.name")
            for value in NO_TEXTS
        ),
        ({"manifest.json": DEEP}, "manifest.json is not JSON"),
        *((docker(images), "manifest.json is not valid") for images in ({}, *NO_LISTS_OF_TEXTS)),
        *((docker_image(Config=value), "manifest.json is not valid") for value in (None, *NO_TEXTS)),
        *((docker_image(Layers=value), "manifest.json is not valid") for value in (None, {}, *NO_LISTS_OF_TEXTS)),
        *((docker_image(RepoTags=value), "manifest.json is not valid") for value in NO_LISTS_OF_TEXTS),
        *(
            (docker_image(config), "the config c.json states no layers")
            for config in (DEEP, LONG_NUMBER, b"7", b"[]", b'{"rootfs":[]}', b'{"rootfs":{"diff_ids":7}}')
        ),
        (docker_image(b'{"rootfs":{"diff_ids":{}}}'), "the config c.json states no layers"),
        (docker_image(b'{"rootfs":{"diff_ids":"abc"}}'), "the config c.json states no layers"),
        (docker_image(Config="none"), "is incomplete: it has no file none"),
        (docker_image(Config="a\0b"), "is incomplete: it has no file a\0b"),
        (docker_image(Config="\ud800"), "is incomplete: it has no file \ud800"),
        (docker_image(Config="x" * 5000), "is incomplete: it has no file xxx"),
        (docker_image(Layers=["a\0b"]), "is incomplete: it has no file a\0b"),
    ],
)
@pytest.mark.parametrize("is_directory", [False, True])
def test_unexpected_content(tmp_path: Path, files: dict[str, bytes], reason: str, is_directory: bool) -> None:
    """An archive or directory whose JSON has other values than a layout or an archive of `docker save` raises
    ImageFileFailed, which names the file."""
    path = tmp_path / "x"
    if is_directory:
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
    else:
        write_tar(path, files)
    with pytest.raises(ImageFileFailed, match=f"(?s)^{path}.*{reason}"):
        find(path)


@pytest.mark.parametrize("value", [None, []])
def test_docker_image_without_names(tmp_path: Path, value: Any) -> None:
    """`docker save` of an image without a name writes `null`, or an empty list, in place of the names."""
    assert find(write_tar(tmp_path / "x.tar", docker_image(RepoTags=value))).images[0].names == ()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.slow
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("at", [0.02, 0.5, 0.9, 0.9999])
def test_damaged_compression(tmp_path: Path, compression: str, at: float) -> None:
    """If an archive is damaged in its compressed form, wherever that is, the import fails with one line that names the
    file."""
    archive = write_archive(
        tmp_path / "x.tar", image("one", layer({"noise": noise("one", 300_000)}), layer({"two": b"2"})), "team/app:1"
    )
    data = bytearray(COMPRESSIONS[compression](archive.read_bytes()))
    start = int(len(data) * at)
    for position in range(start, min(start + 200, len(data))):
        data[position] ^= 0xFF
    path = tmp_path / f"bad.tar.{compression}"
    path.write_bytes(data)
    message = error_line(entrepot("import", path, folder=tmp_path), 1)
    assert message.startswith(str(path))


def test_broken_headers(tmp_path: Path) -> None:
    """Headers of an archive that the parser of tar archives cannot read raise ImageFileFailed: a chain of thousands of
    extended headers, a length with thousands of digits, and a sparse file whose map is no list of numbers."""
    blocks = []
    for _ in range(3000):
        header = tarfile.TarInfo("x")
        header.type, header.size = tarfile.XHDTYPE, 11
        blocks.append(header.tobuf() + b"11 path=ab\n".ljust(512, b"\0"))
    (tmp_path / "chain.tar").write_bytes(b"".join(blocks))
    for name, headers in {
        "sparse.tar": {"GNU.sparse.map": "a,b", "GNU.sparse.size": "1"},
        "size.tar": {"GNU.sparse.map": "9" * 5000 + ",1"},
    }.items():
        with tarfile.open(tmp_path / name, "w", format=tarfile.PAX_FORMAT) as archive:
            member = tarfile.TarInfo("index.json")
            member.pax_headers = headers
            archive.addfile(member, io.BytesIO())
    for name in ("chain.tar", "sparse.tar", "size.tar"):
        with pytest.raises(ImageFileFailed, match=name):
            find(tmp_path / name)


def test_names_in_an_archive_are_printed_without_control_characters(tmp_path: Path) -> None:
    """The error about a name in an archive is one line that cannot control the terminal."""
    path = write_tar(tmp_path / "x.tar", docker_image(Config="\x1b]52;c;cm0=\x07\nc.json"))
    assert error_line(entrepot("import", path, folder=tmp_path), 1).endswith("has no file ?]52;c;cm0=??c.json")


@pytest.mark.parametrize("index", [DEEP, b"[]", b'{"manifests":7}', b'{"manifests":[7]}'])
async def test_export_into_a_damaged_layout(tmp_path: Path, index: bytes) -> None:
    """An export into a directory whose `index.json` is not valid raises ImageFileFailed, which names it."""
    for name, data in layout(index).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageFileFailed, match=r"index\.json is not valid"):
        await LayoutDirectory(tmp_path).finish([], None)
