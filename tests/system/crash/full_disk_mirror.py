"""Fills the disk of a mirror while it downloads a blob from its upstream: `python -m
tests.system.crash.full_disk_mirror FOLDER`.

Run this program in its own mount namespace (`unshare --mount`), because it mounts a tmpfs of 24 MiB on FOLDER/data.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from tests.fakes.client_images import MIB
from tests.fakes.mirror_site import MirrorSite
from tests.system.crash.full_disk import free_bytes

BLOB_BYTES = 12 * MIB


def fill(data: Path) -> Path:
    """Fills the disk until no byte can be written."""
    filler = data / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\1" * 65536):
            pass
    return filler


def main(folder: Path) -> None:
    data = folder / "data"
    data.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(data)], check=True)
    with ExitStack() as stack:
        site = MirrorSite(folder, stack)
        site.start(1000, BLOB_BYTES, settings='prefetch = "off"\nconnections = 1')
        manifest = site.get_manifest().content
        small_blob = f"/v2/library/app/blobs/{site.image.layers[0].digest}"
        assert site.get(small_blob).wait_for_end().body == site.image.layers[0].read()
        site.hub.fault(on="blob", match=site.digest_hex, stall_after=MIB)
        workers = site.server.worker_pids()
        readers = [site.get(worker=pid).wait_for_bytes(MIB) for pid in workers]
        filler = fill(data)
        site.hub.release()
        for reader in readers:
            assert not reader.wait_for_end().is_complete, "a blob without space on the disk should be cut off"
            assert site.blob.startswith(reader.body)
        for pid in workers:
            assert site.get(worker=pid).wait_for_end().body == site.blob
            assert site.get(span=f"{MIB}-", worker=pid).wait_for_end().body == site.blob[MIB:]
            assert site.stored_files() == []
            assert site.get(small_blob, worker=pid).wait_for_end().body == site.image.layers[0].read()
        assert site.get_manifest().content == manifest
        filler.unlink()
        assert free_bytes(data) > BLOB_BYTES, "the partial download still takes space"
        for pid in workers:
            assert site.get(worker=pid).wait_for_end().body == site.blob


if __name__ == "__main__":
    main(Path(sys.argv[1]))
