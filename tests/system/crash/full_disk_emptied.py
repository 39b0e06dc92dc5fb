"""Fills the disk of a server and frees it again with DELETE requests: `python -m tests.system.crash.full_disk_emptied
FOLDER KIND`.

KIND is the file system: `tmpfs`, or `ext4` (which needs root). Run this program in its own mount namespace (`unshare
--mount`), because it mounts the file system on FOLDER/data. Other tests of full disks use its functions.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from storage.content import OCI_MANIFEST, digest_of
from tests.fakes.server_process import RegistryServer, running_server
from tests.system.crash.full_disk import MIB, ask, assert_storage_full, free_bytes, push

LAYER_BYTES = 2 * MIB
TIMEOUT_SECONDS = 60.0
COLLECT_EVERY_SECOND = {"ENTREPOT_GC__GRACE": "0s", "ENTREPOT_GC__INTERVAL": "1s"}


@dataclass(frozen=True)
class OneLayerImage:
    tag: str
    layer: bytes
    body: bytes

    @property
    def digest(self) -> str:
        return digest_of(self.body)


def make_image(number: int) -> OneLayerImage:
    layer = random.Random(number).randbytes(LAYER_BYTES)
    part = {"mediaType": "application/octet-stream", "digest": digest_of(layer), "size": len(layer)}
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": part, "layers": [part]}
    return OneLayerImage(f"v{number}", layer, json.dumps(manifest).encode())


def mount(data: Path, kind: str, size: str = "48m", options: str = "") -> None:
    """Creates the directory `data`, and mounts a new file system on it."""
    data.mkdir()
    if kind == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "none", str(data)], check=True)
        return
    image = data.with_suffix(".img")
    subprocess.run(["truncate", "-s", size, str(image)], check=True)
    subprocess.run([f"mkfs.{kind}", "-q", *(["-m", "0"] if kind == "ext4" else []), str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(data)], check=True)


def fill(data: Path, name: str = "filler") -> Path:
    """Fills the disk to the last byte with a file that does not belong to the registry."""
    filler = data / name
    with filler.open("ab", buffering=0) as file:
        for size in (MIB, 65536, 4096, 512, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\1" * size) == size:
                    pass
    assert free_bytes(data) == 0, free_bytes(data)
    return filler


def until(condition: Callable[[], bool], expected_state: str) -> None:
    """Waits until `condition()` returns True. `expected_state`: a description of the state, for the error."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not in {TIMEOUT_SECONDS:.0f} s: {expected_state}"
        time.sleep(0.02)


def health(server: RegistryServer, name: str) -> tuple[int, dict[str, str]]:
    """Sends the health check `live` or `ready`. Returns the status and the document of the response."""
    status, body, _ = ask(server, "GET", f"/health/{name}")
    return status, json.loads(body)


def push_image(server: RegistryServer, image: OneLayerImage) -> int:
    """Pushes an image. Returns the status of the first refused request, or 201."""
    status = push(server, "team/app", image.layer)[0]
    if status != 201:
        return status
    path = f"/v2/team/app/manifests/{image.tag}"
    return ask(server, "PUT", path, image.body, Content_Type=OCI_MANIFEST)[0]


def push_until_full(server: RegistryServer) -> list[OneLayerImage]:
    """Pushes images until the registry refuses one. Returns the stored images."""
    images: list[OneLayerImage] = []
    while (status := push_image(server, image := make_image(len(images)))) == 201:
        images.append(image)
    assert status == 507, status
    return images


def check_reads(server: RegistryServer, images: list[OneLayerImage]) -> None:
    """Checks that every fourth image can be pulled, and that the lists of repositories and tags can be read."""
    for image in images[::4]:
        for path, body in ((f"manifests/{image.tag}", image.body), (f"blobs/{digest_of(image.layer)}", image.layer)):
            assert ask(server, "GET", f"/v2/team/app/{path}")[:2] == (200, body), path
            assert ask(server, "HEAD", f"/v2/team/app/{path}")[0] == 200, path
    assert ask(server, "GET", "/v2/_catalog")[0] == 200
    tags = json.loads(ask(server, "GET", "/v2/team/app/tags/list")[1])["tags"]
    assert sorted(tags) == sorted(image.tag for image in images)


def check_full_disk_is_reported(server: RegistryServer) -> None:
    """Checks that the health check and the log report the full disk, and that a push gets 507."""
    status, document = health(server, "ready")
    assert (status, document["status"]) == (200, "disk full"), document
    assert "disk" in document["reason"]
    assert health(server, "live") == (200, {"status": "ok"})
    until(lambda: "disk is full" in server.log_text(), "the log says that the disk is full")
    # The start of an upload session needs little space, so it may still succeed. A layer is refused in any case.
    answer = ask(server, "POST", "/v2/team/app/blobs/uploads/")
    assert_storage_full(
        answer if answer[0] == 507 else push(server, "team/app", random.Random(9999).randbytes(LAYER_BYTES))
    )


def delete(server: RegistryServer, images: list[OneLayerImage]) -> None:
    """Deletes the tag, the manifest and the layer of each image. Garbage collection may have removed the layer
    first."""
    for image in images:
        for path in (f"manifests/{image.tag}", f"manifests/{image.digest}", f"blobs/{digest_of(image.layer)}"):
            status, body, _ = ask(server, "DELETE", f"/v2/team/app/{path}")
            is_collected = status == 404 and path.startswith("blobs/")
            assert status == 202 or is_collected, (path, status, body)


def start_collecting_server(folder: Path) -> contextlib.AbstractContextManager[RegistryServer]:
    """Starts a server that collects garbage every second, without a grace period. At the start, the write-ahead log of
    its database is empty."""
    return running_server(folder, workers=2, env=COLLECT_EVERY_SECOND)


def main(folder: Path, kind: str) -> None:
    data = folder / "data"
    mount(data, kind)
    # This server collects with a grace period. Without one, it could remove a blob before its manifest is pushed.
    with running_server(folder, workers=2) as server:
        images = push_until_full(server)
        assert len(images) > 10, len(images)
    with start_collecting_server(folder) as server:
        fill(data)
        check_reads(server, images)
        check_full_disk_is_reported(server)
        deleted, images = images[:5], images[5:]
        delete(server, deleted)
        until(lambda: free_bytes(data) > 3 * LAYER_BYTES, "the space of the deleted images is free")
        check_reads(server, images)
        until(lambda: health(server, "ready")[1] == {"status": "ok"}, "there is free space again")
        until(lambda: push_image(server, deleted[0]) == 201, "pushes work without a restart")
        images.append(deleted[0])
        fill(data)
    # The stop and the start of a server may free some bytes. New files take these bytes.
    fill(data, "more")
    with start_collecting_server(folder) as server:
        fill(data, "still more")
        check_reads(server, images)
        check_full_disk_is_reported(server)
        delete(server, images)
        until(lambda: free_bytes(data) > 8 * LAYER_BYTES, "the space of the deleted images is free")
        until(lambda: health(server, "ready")[1] == {"status": "ok"}, "there is free space again")
        images = [make_image(0)]
        until(lambda: push_image(server, images[0]) == 201, "pushes work without a restart")
        check_reads(server, images)
        assert "Traceback" not in server.log_text(), server.log_text()
    reserve = data / "reserve"
    assert reserve.stat().st_blocks * 512 >= reserve.stat().st_size > MIB, (
        "the file with the reserved space should have its size again"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
