"""Tests of damaged blob files of a mirror. `entrepot scrub`, which checks the digests of all stored blobs, fetches
damaged blobs again from the upstream, and so does the next pull."""

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
    """Returns the file in which the mirror has stored the blob."""
    return Layout(site.server.data).blob(Digest(site.digest))


def scrub(site: MirrorSite, exit_code: int) -> list[dict[str, object]]:
    """Runs `entrepot scrub` while the server runs, and checks its exit code. Returns the events that it printed."""
    process = entrepot("scrub", "--json", "--config", "entrepot.toml", folder=site.folder)
    assert process.returncode == exit_code, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.parametrize("damage", [lambda file: flip_byte(file, SIZE // 2), delete], ids=["flip", "delete"])
def test_scrub_fetches_a_damaged_blob_again(site: MirrorSite, damage: Callable[[Path], None]) -> None:
    """`scrub` reports a damaged or deleted blob file and replaces it. Afterwards both workers serve the right bytes
    without a further request to the upstream."""
    site.start(settings='prefetch = "off"')
    site.get_manifest()
    assert site.get().wait_for_end().body == site.blob
    damage(blob_file(site))
    requests_before = len(site.hub.requests("blob", digest=site.digest))

    damaged, fetched, summary = scrub(site, exit_code=1)

    assert (damaged["event"], damaged["digest"]) == ("damaged", site.digest)
    assert (fetched["event"], fetched["digest"], fetched["repository"]) == ("fetched", site.digest, f"docker.io/{REPO}")
    assert (summary["event"], summary["damaged"], summary["fetched"]) == ("done", 1, 1)
    assert blob_file(site).read_bytes() == site.blob
    requests_of_scrub = site.hub.requests("blob", digest=site.digest)[requests_before:]
    assert requests_of_scrub
    for worker in site.server.worker_pids():
        assert site.get(worker=worker).wait_for_end().body == site.blob
    assert len(site.hub.requests("blob", digest=site.digest)) == requests_before + len(requests_of_scrub)
    assert scrub(site, exit_code=0)[-1]["damaged"] == 0


def test_pull_fetches_a_damaged_blob_again(site: MirrorSite) -> None:
    """While the upstream fails, `scrub` reports that it could not fetch the damaged blob, and pulls of the blob fail,
    so no client gets damaged bytes. After the upstream has recovered, the first pull fetches the blob again."""
    site.start(settings='prefetch = "off"')
    site.get_manifest()
    assert site.get().wait_for_end().body == site.blob
    flip_byte(blob_file(site), SIZE - 1)
    site.hub.fault(on="blob", match=site.digest_hex, status=503, times=None)
    events = scrub(site, exit_code=1)
    assert [event["event"] for event in events] == ["damaged", "not fetched", "done"]
    for worker in site.server.worker_pids():
        assert site.get(worker=worker).wait_for_end().status in (502, 504)
    site.hub.clear()
    for worker in site.server.worker_pids():
        assert site.get(worker=worker).wait_for_end().body == site.blob
    assert union(site.hub.sent_ranges(site.digest))[-1] == (0, SIZE)
    assert scrub(site, exit_code=0)[-1]["damaged"] == 0


def test_pull_fetches_a_deleted_blob_again(site: MirrorSite) -> None:
    """If the file of a blob was deleted, the next pull fetches the blob again and returns the right bytes."""
    site.start(settings='prefetch = "off"')
    site.get_manifest()
    assert site.get().wait_for_end().body == site.blob
    blob_file(site).unlink()
    answer = site.get().wait_for_end()
    assert (answer.status, bytes(answer.body)) == (200, site.blob)
    assert blob_file(site).read_bytes() == site.blob
