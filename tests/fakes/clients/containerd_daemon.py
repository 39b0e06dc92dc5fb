"""Runs a containerd for tests, and its client `ctr`."""

from __future__ import annotations

import contextlib
import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.client_images import ClientImage, write_layout

from .programs import ForeignProgram, ProgramResult, environment, running_daemon, unmount_below

CONFIG = """
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.internal.v1.opt",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
]
[grpc]
address = "{folder}/c.sock"
"""

_OWN_CONNECTION_FAILED = "rpc error: code = Internal desc = unexpected EOF"
"""An error of the gRPC connection between `ctr` and containerd, which has nothing to do with the registry. containerd
1.6 reports it now and then during a push (containerd issue 5734, nerdctl issue 984). If a registry breaks a connection
off, the error has the method and the URL of the request instead."""


@dataclass(frozen=True)
class Containerd:
    """The client `ctr`, connected to a containerd of the tests."""

    call: ForeignProgram
    folder: Path

    def __call__(self, *args: str) -> ProgramResult:
        return self.call(*args)

    def pull(self, name: str, *options: str) -> None:
        self("images", "pull", "--plain-http", "--snapshotter", "native", *options, name)

    def push(self, name: str, source: str, *options: str) -> None:
        """Pushes an image. Pushes it once more after `_OWN_CONNECTION_FAILED`."""
        command = ("images", "push", "--plain-http", *options, name, source)
        result = self.call.attempt(*command)
        if _OWN_CONNECTION_FAILED in result.err:
            result = self.call.attempt(*command)
        result.demand()

    def load(self, image: ClientImage, name: str, folder: Path) -> None:
        """Imports an image into the daemon under `name`, without a registry. `folder` must not exist yet."""
        repo, _, tag = name.rpartition(":")
        with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
            archive.add(write_layout(folder, {tag: image}), "")
        self("images", "import", "--base-name", repo, "--snapshotter", "native", str(folder.with_suffix(".tar")))

    def forget(self, *names: str) -> None:
        """Removes images and their content, so that the next pull has to download the content again."""
        self("images", "remove", "--sync", *names)

    def stored_digests(self) -> set[str]:
        """Returns the digests of all content in the daemon's content store."""
        return set(self("content", "ls", "--quiet").out.split())

    def has_same_bytes(self, image: ClientImage) -> bool:
        """Returns whether the files in the daemon's content store have the original bytes of the image."""
        store = self.folder / "root" / "io.containerd.content.v1.content" / "blobs" / "sha256"
        return all(
            (store / digest.partition(":")[2]).read_bytes() == content.body
            for digest, content in (image.manifests | image.blobs).items()
        )


@contextlib.contextmanager
def running_containerd(folder: Path) -> Iterator[Containerd]:
    """Runs a containerd below `folder` until the block ends. The path of `folder` must be absolute and short, because
    the path of a socket can have at most 107 bytes."""
    config, log = folder / "config.toml", folder / "containerd.log"
    config.write_text(CONFIG.format(folder=folder))
    env = environment(folder / "home")
    ctr = Containerd(ForeignProgram(("ctr", "--address", f"{folder}/c.sock"), env), folder)
    try:
        with running_daemon(
            ["containerd", "--config", str(config)],
            env,
            log,
            lambda: ctr.call.attempt("version").code == 0,
        ):
            yield ctr
    finally:
        unmount_below(folder)


def blobs_of_export(archive: Path) -> dict[str, bytes]:
    """Returns the blobs of an exported OCI archive by digest. Checks that the bytes of each blob match the digest in
    its file name."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.name.startswith("blobs/sha256/") and member.isfile():
                body = tar.extractfile(member)
                assert body is not None
                content = body.read()
                assert hashlib.sha256(content).hexdigest() == member.name.rpartition("/")[2]
                found["sha256:" + member.name.rpartition("/")[2]] = content
    return found
