"""The budget of the mirror's cache, with a real server of two workers that mirrors a fake Hub."""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from registry.cli.output import human_size
from tests.fakes.client_images import MIB
from tests.fakes.commands import entrepot, entrepot_output, json_lines
from tests.fakes.mirror_site import MirrorSite, wait_until
from tests.fakes.upstream_content import ImageTree, noise_image

CLIENTS = 4
IMAGES = 24
BUDGET = 16 * MIB
IMAGE = 2 * MIB


def stored_bytes(site: MirrorSite) -> int:
    """Returns the bytes of all blob files."""
    size = 0
    for path in (site.server.data / "blobs").rglob("*"):
        try:
            size += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return size


def pull(site: MirrorSite, number: int, image: ImageTree) -> None:
    manifest = site.http.get(f"/v2/library/app{number}/manifests/1")
    assert manifest.headers["docker-content-digest"] == image.digest
    for digest, blob in image.blobs.items():
        assert site.http.get(f"/v2/library/app{number}/blobs/{digest}").content == blob.read()


def status(site: MirrorSite) -> list[dict[str, Any]]:
    output = entrepot_output(
        *("cache", "status", "--json", "--config", "entrepot.toml", "--data", "data"), folder=site.folder
    )
    found: list[dict[str, Any]] = json.loads(output)
    return found


@pytest.mark.slow
def test_a_cache_stays_within_its_budget(site: MirrorSite) -> None:
    """Four clients pull three times as much as the budget allows. At no time are more bytes stored than the budget and
    what is in flight, all pulls succeed, and the most recently pulled images stay."""
    images = [
        site.content.add(f"library/app{number}", noise_image(f"app{number}", IMAGE // 2, IMAGE // 2), "1")
        for number in range(IMAGES)
    ]
    site.start(1000, settings=f'cache_max = "{BUDGET}"')
    wait_until(lambda: all(part["complete"] for part in status(site)), "the cache to be counted")
    largest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.01):
            largest = max(largest, stored_bytes(site))

    watcher = threading.Thread(target=watch)
    watcher.start()
    order = list(range(IMAGES))
    random.Random(1).shuffle(order)
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(lambda number: pull(site, number, images[number]), order))
    wait_until(lambda: status(site)[0]["size"] <= BUDGET, "the last eviction")
    done.set()
    watcher.join()
    assert largest <= BUDGET + 2 * CLIENTS * IMAGE
    [hub, everything] = status(site)
    assert hub["size"] == everything["size"] <= BUDGET
    assert hub["images"] >= 5
    wait_until(lambda: stored_bytes(site) <= BUDGET, "the files to be gone")
    site.hub.forget()
    for number in order[-3:]:
        pull(site, number, images[number])
    assert site.asked("blob") == 0
    [entry, *_] = json.loads(
        entrepot_output(
            *("audit", "--action", "manifest.delete", "--json", "--config", "entrepot.toml", "--data", "data"),
            folder=site.folder,
        )
    )
    assert entry["actor"] == "entrepot eviction"


def test_the_commands(site: MirrorSite) -> None:
    """`cache status` shows sizes and budgets. `cache evict` shows what it would evict, and evicts it beside a running
    server. Images that match a `keep` pattern stay."""
    images = [site.content.add(f"library/app{number}", noise_image(f"app{number}", 1000), "1") for number in range(4)]
    site.start(1000, more='[cache]\nkeep = ["docker.io/library/app0"]')
    for number, image in enumerate(images):
        pull(site, number, image)
    where = ("--config", "entrepot.toml", "--data", "data")
    table = entrepot_output("cache", "status", *where, folder=site.folder)
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["docker.io", "all"]
    size = sum(blob.size for blob in images[3].blobs.values())

    plan = entrepot_output("cache", "evict", "--to", str(3 * size), "--dry-run", *where, folder=site.folder)
    assert [line.split()[0] for line in plan.splitlines()[:-1]] == ["docker.io/library/app1:1"]
    assert plan.splitlines()[-1] == f"1 image would be evicted, which frees {human_size(size)}"
    assert status(site)[-1]["images"] == 4

    steps = json_lines(entrepot_output("cache", "evict", "--to", "0", "--json", *where, folder=site.folder))
    assert {step["event"] for step in steps[:-1]} == {"evicted"}
    assert [step["repository"] for step in steps[:-1]] == [f"docker.io/library/app{number}" for number in (1, 2, 3)]
    size_of_all = sum(step["bytes"] for step in steps[:-1])
    assert steps[-1] == {"event": "done", "images": 3, "bytes": size_of_all, "dry_run": False}
    assert [status(site)[-1][name] for name in ("images", "size")] == [1, size]
    pull(site, 1, images[1])

    for arguments, code, message in (
        (("--to", "much"), 2, "--to: 'much' is not a size; write it like 200GiB"),
        ((), 1, "the settings do not limit the cache; say how large it may be, as in --to 200GiB"),
        (
            ("--upstream", "docker.io"),
            1,
            "docker.io has no cache_max in the settings; say how large its cache may be, with --to",
        ),
        (("--upstream", "ghcr.io"), 1, "ghcr.io is not mirrored; the upstreams are docker.io"),
    ):
        failed = entrepot("cache", "evict", *arguments, *where, folder=site.folder)
        assert (failed.returncode, failed.stderr.strip()) == (code, f"entrepot: {message}")
