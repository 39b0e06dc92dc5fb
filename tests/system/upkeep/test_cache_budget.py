"""Tests of the budget (maximum size) of a mirror's cache, with a server of two workers that mirrors a fake Docker
Hub."""

from __future__ import annotations

import json
import random
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
"""Numbers of clients that pull at the same time, and of images that they pull together."""
BUDGET_BYTES = 16 * MIB
IMAGE_BYTES = 2 * MIB


def stored_bytes(site: MirrorSite) -> int:
    """Returns the total size of all blob files in bytes."""
    size = 0
    for path in (site.server.data / "blobs").rglob("*"):
        try:
            size += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return size


def pull(site: MirrorSite, number: int, image: ImageTree) -> None:
    """Pulls an image with all its blobs, and checks them."""
    manifest = site.http.get(f"/v2/library/app{number}/manifests/1")
    assert manifest.headers["docker-content-digest"] == image.digest
    for digest, blob in image.blobs.items():
        assert site.http.get(f"/v2/library/app{number}/blobs/{digest}").content == blob.read()


def status(site: MirrorSite) -> list[dict[str, Any]]:
    """Returns the output of `entrepot cache status`: the cache of each upstream, and the whole cache."""
    output = entrepot_output(
        *("cache", "status", "--json", "--config", "entrepot.toml", "--data", "data"), folder=site.folder
    )
    parts: list[dict[str, Any]] = json.loads(output)
    return parts


@pytest.mark.slow
def test_cache_stays_within_its_budget(site: MirrorSite) -> None:
    """Four clients pull three times as many bytes as the budget allows. Evictions run meanwhile, so that the stored
    bytes do not exceed the budget plus the downloads in progress. All pulls succeed, and the most recently pulled
    images stay in the cache."""
    images = [
        site.content.add(f"library/app{number}", noise_image(f"app{number}", IMAGE_BYTES // 2, IMAGE_BYTES // 2), "1")
        for number in range(IMAGES)
    ]
    site.start(1000, settings=f'cache_max = "{BUDGET_BYTES}"')
    wait_until(lambda: all(part["complete"] for part in status(site)), "the cache to be counted")
    order = list(range(IMAGES))
    random.Random(1).shuffle(order)
    late_evictions = 0

    def pull_in_turn(number: int) -> None:
        nonlocal late_evictions
        if stored_bytes(site) > BUDGET_BYTES + CLIENTS * IMAGE_BYTES:
            # A process that evicts may be stopped for a second or two. Its eviction must then come without more pulls.
            late_evictions += 1
            wait_until(lambda: stored_bytes(site) <= BUDGET_BYTES, "an eviction")
        pull(site, number, images[number])

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(pull_in_turn, order))
    assert late_evictions <= CLIENTS
    wait_until(lambda: status(site)[0]["size"] <= BUDGET_BYTES, "the last eviction")
    [hub, whole_cache] = status(site)
    assert hub["size"] == whole_cache["size"] <= BUDGET_BYTES
    assert hub["images"] >= 5
    wait_until(lambda: stored_bytes(site) <= BUDGET_BYTES, "the files to be gone")
    site.hub.forget()
    for number in order[-3:]:
        pull(site, number, images[number])
    assert site.count_requests("blob") == 0
    [entry, *_] = json.loads(
        entrepot_output(
            *("audit", "--action", "manifest.delete", "--json", "--config", "entrepot.toml", "--data", "data"),
            folder=site.folder,
        )
    )
    assert entry["actor"] == "entrepot eviction"


def test_cache_commands(site: MirrorSite) -> None:
    """`cache status` shows sizes and budgets. `cache evict --dry-run` shows which images would be evicted, and `cache
    evict` evicts them while the server runs. Images that match a `keep` pattern stay."""
    images = [site.content.add(f"library/app{number}", noise_image(f"app{number}", 1000), "1") for number in range(4)]
    site.start(1000, more='[cache]\nkeep = ["docker.io/library/app0"]')
    for number, image in enumerate(images):
        pull(site, number, image)
    options = ("--config", "entrepot.toml", "--data", "data")
    table = entrepot_output("cache", "status", *options, folder=site.folder)
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["docker.io", "all"]
    size = sum(blob.size for blob in images[3].blobs.values())

    plan = entrepot_output("cache", "evict", "--to", str(3 * size), "--dry-run", *options, folder=site.folder)
    assert [line.split()[0] for line in plan.splitlines()[:-1]] == ["docker.io/library/app1:1"]
    assert plan.splitlines()[-1] == f"1 image would be evicted, which frees {human_size(size)}"
    assert status(site)[-1]["images"] == 4

    events = json_lines(entrepot_output("cache", "evict", "--to", "0", "--json", *options, folder=site.folder))
    assert {event["event"] for event in events[:-1]} == {"evicted"}
    assert [event["repository"] for event in events[:-1]] == [f"docker.io/library/app{number}" for number in (1, 2, 3)]
    size_of_all = sum(event["bytes"] for event in events[:-1])
    assert events[-1] == {"event": "done", "images": 3, "bytes": size_of_all, "dry_run": False}
    assert [status(site)[-1][name] for name in ("images", "size")] == [1, size]
    pull(site, 1, images[1])

    for arguments, exit_code, message in (
        (("--to", "much"), 2, "--to: 'much' is not a size; write it like 200GiB"),
        ((), 1, "the settings do not limit the cache; say how large it may be, as in --to 200GiB"),
        (
            ("--upstream", "docker.io"),
            1,
            "docker.io has no cache_max in the settings; say how large its cache may be, with --to",
        ),
        (("--upstream", "ghcr.io"), 1, "ghcr.io is not mirrored; the upstreams are docker.io"),
    ):
        failed = entrepot("cache", "evict", *arguments, *options, folder=site.folder)
        assert (failed.returncode, failed.stderr.strip()) == (exit_code, f"entrepot: {message}")
