"""Writes a data directory in the format of the previous release, with plain files and SQL.

This module does not use the product's code that writes data directories. Its paths, tables and records are written out
here. So if a change of the product alters a path, the meaning of a table or the bytes of a record, a test fails.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import apsw

from storage.running_digest import start_digest

TABLES = [
    "0001_start.sql",
    "0002_upstreams.sql",
    "0003_wrong_bytes.sql",
    "0004_access.sql",
    "0005_confirmed_links.sql",
    "0006_referrers_by_type.sql",
]
NOW = 1_760_000_000.0
UPLOAD = "11111111-2222-4333-8444-555555555555"
BARE_UPLOAD = "66666666-7777-4888-9999-000000000000"
"""The id of an upload session without bytes."""
CONFIG, LAYER = b'{"os":"linux"}', bytes(range(256)) * 400
MIRRORED_LAYER = b"from far away" * 9000
"""The layer of the cached image."""
UPLOADED_BYTES = b"half of an upload" * 1000
"""The bytes of the upload session `UPLOAD` so far."""
PARTIAL = b"a blob on its way in" * 5000
"""The content of a partial blob: a blob whose download from the upstream is not complete."""
PARTIAL_STOP = 40_000
"""Number of bytes of `PARTIAL` that are downloaded already."""


@dataclass(frozen=True)
class Written:
    """The bodies of the manifests in the directory: that of the pushed image, and that of the cached image."""

    manifest: bytes
    mirrored_manifest: bytes


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def image(*blobs: bytes) -> bytes:
    """Returns an image manifest. The first blob is the config, all others are layers."""
    parts = [{"mediaType": "application/octet-stream", "digest": digest(b), "size": len(b)} for b in blobs]
    kind = "application/vnd.oci.image.manifest.v1+json"
    return json.dumps({"schemaVersion": 2, "mediaType": kind, "config": parts[0], "layers": parts[1:]}).encode()


def write_data_dir(data: Path, boot: str) -> Written:
    """Creates the data directory `data`. `boot`: the boot id of the machine when the data was written."""
    for name in ("locks", "uploads", "partials", "trash"):
        (data / name).mkdir(parents=True)
    for algorithm in ("sha256", "sha512"):
        for shard in range(256):
            (data / "blobs" / algorithm / f"{shard:02x}").mkdir(parents=True)
    for lock in ("metadata", "collect", "turns", *(f"{stripe:02x}" for stripe in range(256))):
        (data / "locks" / lock).touch()
    for blob in (CONFIG, LAYER, MIRRORED_LAYER):
        _blob_path(data, blob).write_bytes(blob)
    (data / "trash" / ("0" * 64)).write_bytes(b"was being deleted")
    (data / "uploads" / UPLOAD).mkdir()
    # The name of the file is the number of the session's last request.
    (data / "uploads" / UPLOAD / "3").write_bytes(UPLOADED_BYTES)
    _write_partial(data, boot)
    written = Written(image(CONFIG, LAYER), image(MIRRORED_LAYER))
    db = apsw.Connection(str(data / "entrepot.db"))
    try:
        db.pragma("journal_mode", "wal")
        for name in TABLES:
            db.execute((resources.files("storage.metadata.sqlite.migrations") / name).read_text())
        db.pragma("user_version", len(TABLES))
        _write_rows(db, written, boot)
    finally:
        db.close()
    return written


def _blob_path(data: Path, blob: bytes) -> Path:
    encoded = hashlib.sha256(blob).hexdigest()
    return data / "blobs" / "sha256" / encoded[:2] / encoded


def _write_partial(data: Path, boot: str) -> None:
    name = f"docker.io~{digest(PARTIAL).replace(':', '-')}.{len(PARTIAL)}"
    content = data / "partials" / f"{name}.data"
    content.write_bytes(PARTIAL[:PARTIAL_STOP] + bytes(len(PARTIAL) - PARTIAL_STOP))
    # The format is that of storage/blobs/files/partial_state_format.py: a head, the ranges, and a checksum.
    body = struct.pack("<8sIIQ40s", b"partial1", 0, 2, len(PARTIAL), boot.encode()) + struct.pack(
        "<2Q", 0, PARTIAL_STOP
    )
    record = body + struct.pack("<I", zlib.crc32(body))
    (data / "partials" / f"{name}.state").write_bytes(record.ljust(4096, b"\0"))


def _write_rows(db: apsw.Connection, written: Written, boot: str) -> None:
    for repository, name in ((1, "team/app"), (2, "docker.io/library/ubuntu")):
        db.execute("INSERT INTO repository VALUES (?, ?, ?, 1)", (repository, name, NOW))
    for number, blob in enumerate((CONFIG, LAYER, MIRRORED_LAYER), 1):
        encoded = hashlib.sha256(blob).hexdigest()
        path = f"blobs/sha256/{encoded[:2]}/{encoded}"
        db.execute("INSERT INTO blob VALUES (?, ?, ?, ?, ?)", (number, digest(blob), len(blob), path, NOW))
    for repository, number in ((1, 1), (1, 2), (2, 3)):
        db.execute("INSERT INTO blob_link VALUES (?, ?, ?, 1)", (repository, number, NOW))
    kind = "application/vnd.oci.image.manifest.v1+json"
    for number, body, blobs in (
        (1, written.manifest, (CONFIG, LAYER)),
        (2, written.mirrored_manifest, (MIRRORED_LAYER,)),
    ):
        db.execute(
            "INSERT INTO manifest VALUES (?, ?, ?, ?, ?, NULL, 'application/octet-stream', NULL, ?, ?)",
            (number, number, digest(body), kind, len(body), NOW, body),
        )
        for blob in blobs:
            db.execute("INSERT INTO manifest_blob VALUES (?, ?, ?)", (number, digest(blob), number))
        db.execute("INSERT INTO tag VALUES (?, 'latest', ?, ?)", (number, number, NOW))
    running = start_digest("sha256")
    running.update(UPLOADED_BYTES)
    for upload, offset, state in ((UPLOAD, len(UPLOADED_BYTES), running.save()), (BARE_UPLOAD, 0, None)):
        db.execute(
            "INSERT INTO upload VALUES (?, 'team/app', 'sha256', ?, ?, ?, ?, ?, 'alice')",
            (upload, offset, state, boot, NOW, NOW),
        )
    db.execute("INSERT INTO upstream_check VALUES ('docker.io/library/ubuntu', 'latest', ?, 1)", (NOW,))
    db.execute("INSERT INTO upstream_token VALUES ('docker.io pull ubuntu', 'a token', 4e9)")
    db.execute("INSERT INTO upstream_allowance VALUES ('docker.io', ?, 97, 100, 0.0)", (NOW,))
    db.execute("UPDATE access SET epoch = 5, closed = 1")
    db.execute("INSERT INTO account VALUES ('alice', 'user', 'a hash', 1, 1, 2, ?, 'first')", (NOW,))
    db.execute("INSERT INTO account_group VALUES ('dev', ?)", (NOW,))
    db.execute("INSERT INTO group_member VALUES ('dev', 'alice')")
    db.execute("INSERT INTO access_grant VALUES ('group', 'dev', 'team/**', 3)")
    db.execute("INSERT INTO signing_key VALUES ('key', x'00ff', ?, NULL, NULL)", (NOW,))
