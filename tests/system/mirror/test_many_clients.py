"""Tests that 32 clients at the same time cause no more upstream requests than a single client."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import repeated, union
from tests.fakes.mirror_site import REPO, MirrorSite
from tests.fakes.upstream_content import index_of, noise_image

CLIENTS = 32


def fetch(site: MirrorSite, path: str) -> bytes:
    """Returns the complete body of a path below the repository."""
    answer = site.get(f"/v2/{REPO}/{path}").wait_for_end()
    assert answer.is_complete, (path, answer.status, len(answer.body))
    return bytes(answer.body)


def fetch_checked(site: MirrorSite, kind: str, digest: str) -> bytes:
    """Fetches a manifest or blob, and checks its digest."""
    body = fetch(site, f"{kind}/{digest}")
    assert "sha256:" + hashlib.sha256(body).hexdigest() == digest
    return body


def pull(site: MirrorSite, start: threading.Barrier) -> None:
    """Pulls as docker does: index, manifest, then all blobs at the same time."""
    start.wait()
    index: dict[str, Any] = json.loads(fetch(site, "manifests/many"))
    (entry,) = (each for each in index["manifests"] if each["platform"]["architecture"] == "amd64")
    manifest = json.loads(fetch_checked(site, "manifests", entry["digest"]))
    with ThreadPoolExecutor(3) as layers:
        digests = [blob["digest"] for blob in (manifest["config"], *manifest["layers"])]
        list(layers.map(lambda digest: fetch_checked(site, "blobs", digest), digests))


def test_many_clients_pull_an_uncached_image(site: MirrorSite) -> None:
    """32 clients pull the same image through two workers. The upstream sends each byte and each manifest once, and
    issues one token. All digests are right, and no content of the index's other platform is fetched."""
    amd64 = noise_image("crowd", 1000, 2 * MIB, 9 * MIB)
    arm64 = noise_image("arm", 2000, MIB, architecture="arm64")
    index = site.content.add(REPO, index_of((amd64, "amd64"), (arm64, "arm64")), "many")
    site.start(latency=0.05)
    start = threading.Barrier(CLIENTS)
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(lambda _: pull(site, start), range(CLIENTS)))
    assert site.hub.count("manifest", "GET", index.digest) == 1
    assert site.hub.count("manifest", "GET", amd64.digest) == 1
    assert site.hub.count("manifest", "HEAD") == 0
    assert site.hub.count("token") == 1
    for digest, blob in amd64.blobs.items():
        assert repeated(site.hub.sent_ranges(digest)) == []
        assert union(site.hub.sent_ranges(digest)) == [(0, blob.size)]
    assert not any(site.hub.requests(digest=digest) for digest in (arm64.digest, *arm64.blobs))
    worker_pids = set(re.findall(r"registry\.access\[(\d+)\]", site.server.log_text()))
    assert len(worker_pids) == 2, "the test did not reach both workers"


def test_many_clients_request_unknown_content(site: MirrorSite) -> None:
    """Each client gets 404, and the upstream gets only one request for a manifest. For a blob it gets two: a HEAD for
    the blob's size, and a GET that shows which server sends the bytes."""
    site.start(latency=0.05)
    path, zeros = f"/v2/{REPO}", f"sha256:{'0' * 64}"
    for unknown, requests in (("manifests/none", 1), (f"manifests/{zeros}", 1), (f"blobs/{zeros}", 2)):
        readers = [site.get(f"{path}/{unknown}") for _ in range(CLIENTS)]
        assert {reader.wait_for_end().status for reader in readers} == {404}
        assert site.count_requests(match=unknown) == requests
