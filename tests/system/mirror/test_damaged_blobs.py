"""Damaged blobs of a mirror: scrub fetches them again from the upstream, and so does the next pull."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.data_dir.layout import Layout
from storage.names import Digest
from tests.fakes.commands import entrepot
from tests.fakes.hub.hub import union
from tests.fakes.mirror_site import REPO, SIZE, MirrorSite
from tests.fakes.scrub_runs import delete, flip_byte


def blob_file(site: MirrorSite) -> Path:
    return Layout(site.server.data).blob(Digest(site.digest))


def scrub(site: MirrorSite, code: int) -> list[dict[str, object]]:
    """Runs `entrepot scrub` beside the server."""
    done = entrepot("scrub", "--json", "--config", "entrepot.toml", folder=site.folder)
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("damage", [lambda file: flip_byte(file, SIZE // 2), delete], ids=["flip", "delete"])
def test_scrub_fetches_a_damaged_blob_again(site: MirrorSite, damage: Callable[[Path], None]) -> None:
    """After a scrub, both workers serve the right bytes, without a pull."""
    site.start(settings='prefetch = "off"')
    site.inspect()
    assert site.get().ended().body == site.blob
    damage(blob_file(site))
    before = len(site.hub.requests("blob", digest=site.digest))

    damaged, fetched, done = scrub(site, code=1)

    assert (damaged["event"], damaged["digest"]) == ("damaged", site.digest)
    assert (fetched["event"], fetched["digest"], fetched["repository"]) == ("fetched", site.digest, f"docker.io/{REPO}")
    assert (done["event"], done["damaged"], done["fetched"]) == ("done", 1, 1)
    assert blob_file(site).read_bytes() == site.blob
    asked = site.hub.requests("blob", digest=site.digest)[before:]
    assert asked
    for worker in site.server.worker_pids():
        assert site.get(worker=worker).ended().body == site.blob
    assert len(site.hub.requests("blob", digest=site.digest)) == before + len(asked)
    assert scrub(site, code=0)[-1]["damaged"] == 0


def test_a_pull_fetches_it_again(site: MirrorSite) -> None:
    """While the upstream is down, scrub leaves the blob damaged and says so. No client gets the damaged bytes: a pull
    fails. The first pull after the upstream is back heals the blob."""
    site.start(settings='prefetch = "off"')
    site.inspect()
    assert site.get().ended().body == site.blob
    flip_byte(blob_file(site), SIZE - 1)
    site.hub.fault(on="blob", match=site.encoded, status=503, times=None)
    steps = scrub(site, code=1)
    assert [step["event"] for step in steps] == ["damaged", "not fetched", "done"]
    for worker in site.server.worker_pids():
        assert site.get(worker=worker).ended().status in (502, 504)
    site.hub.clear()
    for worker in site.server.worker_pids():
        assert site.get(worker=worker).ended().body == site.blob
    assert union(site.hub.sent(site.digest))[-1] == (0, SIZE)
    assert scrub(site, code=0)[-1]["damaged"] == 0


def test_a_pull_of_a_lost_file(site: MirrorSite) -> None:
    """If the file was deleted, the pull that notices this gets the right bytes."""
    site.start(settings='prefetch = "off"')
    site.inspect()
    assert site.get().ended().body == site.blob
    blob_file(site).unlink()
    answer = site.get().ended()
    assert (answer.status, bytes(answer.body)) == (200, site.blob)
    assert blob_file(site).read_bytes() == site.blob
