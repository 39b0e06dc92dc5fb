"""Many clients at the same time cost the upstream as much as one."""

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


def fetch(site: MirrorSite, what: str) -> bytes:
    answer = site.get(f"/v2/{REPO}/{what}").ended()
    assert answer.whole, (what, answer.status, len(answer.body))
    return bytes(answer.body)


def fetch_checked(site: MirrorSite, kind: str, digest: str) -> bytes:
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


def test_a_crowd_pulls_a_cold_image(site: MirrorSite) -> None:
    """32 clients pull through two workers. The upstream sends every byte, every manifest and one token once, all
    digests are right, and the other platform is not fetched."""
    ours = noise_image("crowd", 1000, 2 * MIB, 9 * MIB)
    theirs = noise_image("arm", 2000, MIB, architecture="arm64")
    index = site.content.add(REPO, index_of((ours, "amd64"), (theirs, "arm64")), "many")
    site.start(latency=0.05)
    start = threading.Barrier(CLIENTS)
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(lambda _: pull(site, start), range(CLIENTS)))
    assert site.hub.count("manifest", "GET", index.digest) == 1
    assert site.hub.count("manifest", "GET", ours.digest) == 1
    assert site.hub.count("manifest", "HEAD") == 0
    assert site.hub.count("token") == 1
    for digest, blob in ours.blobs.items():
        assert repeated(site.hub.sent(digest)) == []
        assert union(site.hub.sent(digest)) == [(0, blob.size)]
    assert not any(site.hub.requests(digest=digest) for digest in (theirs.digest, *theirs.blobs))
    workers = set(re.findall(r"registry\.access\[(\d+)\]", site.server.log_text()))
    assert len(workers) == 2, "the test did not reach both workers"


def test_a_crowd_asks_for_what_is_not_there(site: MirrorSite) -> None:
    """Each client gets an error, and the upstream was asked only once: for a blob by a HEAD for its size, and by a GET
    that shows which server answers."""
    site.start(latency=0.05)
    path, zeros = f"/v2/{REPO}", f"sha256:{'0' * 64}"
    for what, requests in (("manifests/none", 1), (f"manifests/{zeros}", 1), (f"blobs/{zeros}", 2)):
        asked = [site.get(f"{path}/{what}") for _ in range(CLIENTS)]
        assert {each.ended().status for each in asked} == {404}
        assert site.asked(match=what) == requests
