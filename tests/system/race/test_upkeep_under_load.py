"""Tests that the upkeep commands lose nothing that was acknowledged, and leave no unneeded files. Sixteen clients push
and pull while garbage collection, retention, cache eviction, scrub and backup run again and again."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from tests.fakes.commands import STACK_DUMP_SITE, entrepot, json_lines
from tests.fakes.raw_http import RawConnection
from tests.fakes.raw_pushes import RawPushes, image
from tests.fakes.second_connection import second_connection
from tests.fakes.server_process import RegistryServer, running_server
from tests.system.race.busy_clients import BusyClient, Counts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CLIENTS = 16
SECONDS = float(os.environ.get("ENTREPOT_RACE_SECONDS", "12"))
"""How long the clients work. For a thorough run, set the variable to 120 or more."""
MIRRORED_IMAGES = 12
MIRRORED_BYTES = 300_000
COMMANDS = (
    (("gc",), ("retention", "apply"), ("fsck",)),
    (("cache", "evict", "--to", "1MiB"), ("scrub", "--rate", "1GiB"), ("backup", "backups", "--keep", "2")),
)
"""Commands for `run_commands`. It repeats each of the two lists, one command after the other, and runs both lists at
the same time."""
EFFECTS = {
    "gc": ("bytes",),
    "retention": ("tags_deleted", "manifests_deleted"),
    "cache": ("images",),
    "scrub": ("blobs", "manifests"),
    "backup": ("copied_blobs",),
}
"""The counts in each command's JSON result that show that the command found something to do."""
UNTAGGED_AT_ONCE = str(Path(__file__).with_name("untagged_at_once.py"))
"""A Python file that the process of `entrepot retention` runs before the command. It lets retention delete untagged
manifests at once. Otherwise, retention would keep them for an hour after their push."""


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """Runs a registry with images that the server mirrors. Each image has a layer of its own and a layer that it shares
    with other images."""
    with running_server(tmp_path_factory.mktemp("upstream"), workers=1) as server:
        numbers = random.Random(7)
        shared = [numbers.randbytes(MIRRORED_BYTES // 3) for _ in range(MIRRORED_IMAGES // 4)]
        with RawConnection(("127.0.0.1", server.port)) as wire:
            for number in range(MIRRORED_IMAGES):
                blobs = b'{"n":%d}' % number, shared[number % len(shared)], numbers.randbytes(MIRRORED_BYTES)
                pushes = RawPushes(wire, f"org/app{number}")
                for data in blobs:
                    pushes.blob(data)
                pushes.manifest(image(*blobs), "latest")
        yield server


@pytest.fixture
def server(tmp_path: Path, upstream: RegistryServer) -> Iterator[RegistryServer]:
    (tmp_path / "entrepot.toml").write_text(f"""
[gc]
grace = 0
interval = "1s"
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
    """After the load, each acknowledged manifest can be pulled with all its blobs. `fsck` finds no errors. The files in
    the store are exactly those of the blobs that repositories are linked to. The last backup can be restored, and
    `fsck` finds no errors in the restored data."""
    stop = threading.Event()
    mirrored = tuple(f"up.test/org/app{number}" for number in range(MIRRORED_IMAGES))
    clients = [BusyClient(server.port, number, stop, mirrored) for number in range(CLIENTS)]
    config = ("--config", tmp_path / "entrepot.toml")
    options = (*config, "--data", server.data)
    for client in clients:
        client.start()
    try:
        runs = run_commands(options, tmp_path, lambda: any(client.failure for client in clients))
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert [client.failure for client in clients if client.failure] == []
    counts = {
        count.name: sum(getattr(client.counts, count.name) for client in clients)
        for count in dataclasses.fields(Counts)
    }
    print(f"in {SECONDS:.0f} s: {counts}; commands: {dict(runs)}")
    for name, effects in EFFECTS.items():
        for effect in effects:
            assert runs[f"{name} {effect}"] > 0, (name, effect)
    assert runs["fsck"] > 0
    for name in ("pushed", "deleted", "pulled", "mirrored", "mounted"):
        assert counts[name] > 0, name

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda client: pull_everything(client, server.port), clients))
    for _ in range(2):  # the first run keeps links that the last pulls have used; the second run deletes them
        assert entrepot("gc", *options, folder=tmp_path).returncode == 0
    # The last backup was made under the load.
    restored = tmp_path / "restored"
    assert entrepot("restore", "backups", *config, "--data", restored, folder=tmp_path).returncode == 0
    for data in (server.data, restored):
        checked = entrepot("fsck", "--hash", "--json", *config, "--data", data, folder=tmp_path)
        assert checked.returncode == 0, checked.stdout
    check_files(server.data)
    errors = [line for line in server.log_text().splitlines() if " ERROR " in line or line.startswith("Traceback")]
    assert errors == []


def run_commands(options: tuple[str | Path, ...], folder: Path, is_failed: Callable[[], bool]) -> Counter[str]:
    """Runs `COMMANDS` for `SECONDS`, or until `is_failed` returns true. Returns how often each command ran, and the
    sums of its `EFFECTS`."""
    start = time.monotonic()

    def run_in_turn(commands: tuple[tuple[str, ...], ...]) -> Counter[str]:
        counts: Counter[str] = Counter()
        effect_names = {f"{name} {effect}" for name, *_ in commands for effect in EFFECTS.get(name, ())}
        for command in itertools.cycle(commands):
            seconds = time.monotonic() - start
            # On a slow machine, a command may have found nothing to do yet.
            has_worked = all(counts[effect] for effect in effect_names)
            if is_failed() or seconds > SECONDS + 60 or (seconds > SECONDS and has_worked):
                break
            name = command[0]
            # `site` is the Python file that the process runs before the command. The default file prints the stacks of
            # a command that does not end.
            site = UNTAGGED_AT_ONCE if name == "retention" else STACK_DUMP_SITE
            process = entrepot(*command, "--json", *options, folder=folder, site=site)
            assert process.returncode == 0, (command, process.stdout, process.stderr)
            result = json_lines(process.stdout)[-1]
            counts[name] += 1
            counts.update({f"{name} {effect}": result[effect] for effect in EFFECTS.get(name, ())})
        return counts

    with ThreadPoolExecutor(len(COMMANDS)) as threads:
        return sum(threads.map(run_in_turn, COMMANDS), Counter())


def pull_everything(client: BusyClient, port: int) -> None:
    """Pulls every manifest that the server has acknowledged to the client, and checks the tags to which no retention
    rule applies."""
    acknowledged = client.acknowledged
    with RawConnection(("127.0.0.1", port)) as wire:
        for repo, digest in list(acknowledged.manifests):
            # `pull_whole` removes the entry of a manifest that retention has deleted. For an index, it does so for the
            # images of the index as well. So an entry of the copied list may be gone.
            if (repo, digest) in acknowledged.manifests:
                client.pull_whole(wire, repo, digest)
        for (repo, tag), digest in acknowledged.tags.items():
            if repo == client.kept:
                answer = wire.ask("GET", f"/v2/{repo}/manifests/{tag}")
                assert answer["docker-content-digest"] == digest


def check_files(data: Path) -> None:
    """Checks that the blob files have exactly the total size of the blobs that repositories are linked to, and that no
    files of deletions, uploads and downloads are left."""
    with closing(second_connection(data / "entrepot.db", read_only=True)) as db:
        linked_bytes: int = db.execute("SELECT sum(size) FROM blob WHERE id IN (SELECT blob FROM blob_link)").get
    assert sum(path.stat().st_size for path in (data / "blobs").rglob("*") if path.is_file()) == linked_bytes
    for folder in ("trash", "uploads", "partials"):
        assert [path for path in (data / folder).rglob("*") if path.is_file()] == []
