"""`entrepot import FILE` refuses a damaged or hostile file with an error that names the file and what is wrong."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry.upkeep.images import tar_archives
from registry.upkeep.images.file_sources import SourceFile, open_file_source
from registry.upkeep.images.found_images import FoundContent, find_images
from registry.upkeep.images.image_file_writers import LayoutDirectory
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
    with open_file_source(path) as source:
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


@pytest.mark.slow
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


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, data: bytes = b"") -> bytes:
    """Returns the header of a member, and its data in whole blocks."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def pax(values: dict[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """Returns an extended header with these pax records."""
    records = b""
    for key, value in values.items():
        record = f" {key}={value}\n".encode()
        size = len(record) + 1
        while len(str(size)) + len(record) != size:
            size = len(str(size)) + len(record)
        records += str(size).encode() + record
    return header("pax", len(records), kind, records)


def sparse(**values: str) -> bytes:
    """Returns a sparse file of 1 EiB that has one byte."""
    records = {f"GNU.sparse.{key}": value for key, value in values.items()}
    return pax({**records, "GNU.sparse.size": str(1 << 60)}) + header("blob", 1, data=b"x")


EMPTY = header("first")
LONG = 1 << 24
"""The size of an extended header that is too long."""


@pytest.mark.parametrize(
    "members",
    [
        pax({"size": "-1536"}) + header("x"),
        pax({"size": "-1536"}) + header("x", kind=b"9"),
        pax({"size": "-512"}) + header("x"),
        header("x", -512),
        header("x", -1024),
        header("x", -1024, b"9"),
        header("x", -512, tarfile.GNUTYPE_LONGNAME) + header("y"),
        header("x", -512, tarfile.XHDTYPE) + header("y"),
        pax({"size": "0", "GNU.sparse.realsize": "-2048"}) + header("x"),
    ],
)
def test_members_of_a_negative_size(tmp_path: Path, members: bytes) -> None:
    """An archive whose members have a negative size, so that the next member begins before them, is refused. It would
    have no end."""
    (tmp_path / "x.tar").write_bytes(EMPTY + members + EMPTY + bytes(1024))
    with pytest.raises(ImageFileFailed, match=r"x\.tar"):
        find(tmp_path / "x.tar")


@pytest.mark.parametrize("names", [["same"] * 11, [f"name{number}" for number in range(11)]])
def test_largest_number_of_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    """An archive may have MAX_MEMBERS files, also if they have the same name."""
    monkeypatch.setattr(tar_archives, "MAX_MEMBERS", 10)
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(header(name) for name in names[:10]) + bytes(1024))
    with open_file_source(path) as source:
        assert source.size(names[9]) == 0
    path.write_bytes(b"".join(header(name) for name in names) + bytes(1024))
    with pytest.raises(ImageFileFailed, match=r"x\.tar has more than 10 files"):
        find(path)


@pytest.mark.parametrize("compression", [*COMPRESSIONS, "tar"])
@pytest.mark.parametrize("before", [b"", EMPTY])
@pytest.mark.slow
def test_long_names(tmp_path: Path, compression: str, before: bytes) -> None:
    """A name that takes megabytes is refused before it is read. The longest path of a file system can be read."""
    compress = COMPRESSIONS.get(compression, bytes)
    path = tmp_path / "x"
    path.write_bytes(
        compress(before + header("long", LONG, tarfile.GNUTYPE_LONGNAME, b"a" * LONG) + EMPTY + bytes(1024))
    )
    tracemalloc.start()
    try:
        with pytest.raises(ImageFileFailed, match=r"has headers of more than 16384 bytes for one file"):
            find(path)
        assert tracemalloc.get_traced_memory()[1] < LONG
    finally:
        tracemalloc.stop()
    name = "a/" * 2000 + "b"
    path.write_bytes(compress(before + pax({"path": name}) + header("x", 1, data=b"1") + bytes(1024)))
    with open_file_source(path) as source, source.open(name) as file:
        assert file.read() == b"1"


@pytest.mark.parametrize(
    "members",
    [
        header("long", LONG, tarfile.GNUTYPE_LONGLINK, b"a" * LONG),
        header("long", LONG, tarfile.XHDTYPE, b"a" * LONG),
        header("long", LONG, tarfile.XGLTYPE, b"a" * LONG),
        header("long", LONG, tarfile.SOLARIS_XHDTYPE, b"a" * LONG),
        pax({"path": "a" * 9000}) + pax({"path": "a" * 9000}),
        pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
        + header("x", LONG, data=b"9999999\n" + b"1\n" * 10_000),
    ],
)
def test_long_extended_headers(tmp_path: Path, members: bytes) -> None:
    """The headers of one file are refused if they are longer than 16 KiB together, whatever they contain."""
    (tmp_path / "x.tar").write_bytes(members + EMPTY + bytes(1024))
    with pytest.raises(ImageFileFailed, match=r"x\.tar has headers of more than 16384 bytes for one file"):
        find(tmp_path / "x.tar")


def test_many_extended_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extended headers of all files are refused if they are longer than the limit together."""
    monkeypatch.setattr(tar_archives, "MAX_EXTENDED_BYTES", 10 * 1024)
    path = tmp_path / "x.tar"
    path.write_bytes((pax({"path": "name"}) + header("x")) * 10 + bytes(1024))
    with open_file_source(path) as source:
        assert source.size("name") == 0
    path.write_bytes((pax({"path": "name"}) + header("x")) * 11 + bytes(1024))
    with pytest.raises(ImageFileFailed, match=r"x\.tar has extended headers of more than 10240 bytes"):
        find(path)


def test_many_global_records(tmp_path: Path) -> None:
    """Hundreds of records for all files are refused: the parser goes through all of them for each file."""
    records = pax({f"key{number}": "x" for number in range(200)}, tarfile.XGLTYPE)
    (tmp_path / "x.tar").write_bytes(records + header("x") * 2 + bytes(1024))
    with pytest.raises(ImageFileFailed, match=r"x\.tar has more than 100 global pax records"):
        find(tmp_path / "x.tar")


@pytest.mark.parametrize("members", [sparse(map="0,1"), sparse(offset="0", numbytes="1")])
def test_sparse_files(tmp_path: Path, members: bytes) -> None:
    """A sparse file is refused: an archive of 3 KiB could have files of 1 EiB."""
    (tmp_path / "x.tar").write_bytes(members + bytes(1024))
    with pytest.raises(ImageFileFailed, match=r"x\.tar has the sparse file blob; pack the images without --sparse"):
        find(tmp_path / "x.tar")


def test_file_that_needs_too_much_memory() -> None:
    """If the decompression of a file needs more memory than there is, the error names the archive and the file."""

    class File(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise MemoryError

    with pytest.raises(ImageFileFailed, match=r"^x\.tar is damaged or cut off at blob: MemoryError$"):
        SourceFile("x.tar", "blob", File()).read()


@pytest.mark.slow
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
