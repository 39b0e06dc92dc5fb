"""Sixteen clients at work while collection, retention, eviction and scrub run again and again: nothing that was
acknowledged is lost, and nothing is left over."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from tests.fakes.commands import entrepot
from tests.fakes.raw_http import RawConnection
from tests.fakes.raw_pushes import RawPushes, image
from tests.fakes.server_process import RegistryServer, running_server
from tests.system.race.busy_clients import BusyClient

pytestmark = pytest.mark.timeout(900)
CLIENTS = 16
SECONDS = float(os.environ.get("ENTREPOT_RACE_SECONDS", "25"))
MIRRORED_IMAGES = 12
MIRRORED_BYTES = 300_000
COMMANDS = (("gc",), ("retention", "apply"), ("scrub", "--rate", "1GiB"), ("cache", "evict", "--to", "1MiB"))


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A registry with images that the server mirrors."""
    with running_server(tmp_path_factory.mktemp("upstream"), workers=1) as server:
        numbers = random.Random(7)
        with RawConnection(("127.0.0.1", server.port)) as wire:
            for number in range(MIRRORED_IMAGES):
                config, layer = b'{"n":%d}' % number, numbers.randbytes(MIRRORED_BYTES)
                pushes = RawPushes(wire, f"org/app{number}")
                pushes.blob(config)
                pushes.blob(layer)
                pushes.manifest(image(config, layer), "latest")
        yield server


@pytest.fixture
def server(tmp_path: Path, upstream: RegistryServer) -> Iterator[RegistryServer]:
    (tmp_path / "entrepot.toml").write_text(f"""
[gc]
grace = 0
interval = "2s"
[[retention]]
repositories = "scratch/**"
keep_last = 3
delete_untagged_after = "0s"
[[upstream]]
name = "up.test"
endpoints = ["{upstream.url}"]
cache_max = "3MiB"
""")
    with running_server(tmp_path, "--config", str(tmp_path / "entrepot.toml")) as server:
        yield server


def test_nothing_acknowledged_is_lost(server: RegistryServer, tmp_path: Path) -> None:
    """After the load each acknowledged manifest pulls whole, `fsck` is clean, and the files are the linked blobs."""
    stop = threading.Event()
    mirrored = tuple(f"up.test/org/app{number}" for number in range(MIRRORED_IMAGES))
    clients = [BusyClient(server.port, number, stop, mirrored) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    options = ("--config", tmp_path / "entrepot.toml", "--data", server.data)
    end = time.monotonic() + SECONDS
    runs = 0
    for command in itertools.cycle(COMMANDS):
        if time.monotonic() > end or any(client.failure for client in clients):
            break
        done = entrepot(*command, *options, folder=tmp_path)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        runs += 1
    stop.set()
    for client in clients:
        client.join()
    assert [client.failure for client in clients if client.failure] == []
    assert runs >= len(COMMANDS)
    for count in ("pushed", "deleted", "pulled", "mounted"):
        assert sum(getattr(client.counts, count) for client in clients) > CLIENTS, count

    with RawConnection(("127.0.0.1", server.port)) as wire:
        for client in clients:
            for repo, digest in list(client.acknowledged.manifests):
                if (repo, digest) in client.acknowledged.manifests:
                    client.pull_whole(wire, repo, digest)
            for (repo, tag), digest in client.acknowledged.tags.items():
                if repo == client.kept:
                    answer = wire.ask("GET", f"/v2/{repo}/manifests/{tag}")
                    assert answer["docker-content-digest"] == digest
    for _ in range(2):  # the links that the last pulls have touched go in the second
        assert entrepot("gc", *options, folder=tmp_path).returncode == 0
    checked = entrepot("fsck", "--json", *options, folder=tmp_path)
    assert checked.returncode == 0, checked.stdout
    check_files(server.data)


def check_files(data: Path) -> None:
    """The blobs' files have the bytes of the linked blobs and no more, and nothing unfinished is left."""
    with closing(apsw.Connection(str(data / "entrepot.db"), flags=apsw.SQLITE_OPEN_READONLY)) as db:
        linked: int = db.execute("SELECT sum(size) FROM blob WHERE id IN (SELECT blob FROM blob_link)").get
    assert sum(path.stat().st_size for path in (data / "blobs").rglob("*") if path.is_file()) == linked
    for folder in ("trash", "uploads", "partials"):
        assert [path for path in (data / folder).rglob("*") if path.is_file()] == []
