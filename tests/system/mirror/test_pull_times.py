"""Tests that a server with two workers counts the pulls of pushed and of mirrored images."""

from __future__ import annotations

import asyncio

from storage.composition import open_registry
from storage.names import Digest, RepositoryName
from storage.pulls import PullRecord
from tests.fakes.commands import entrepot_output
from tests.fakes.mirror_site import REPO, MirrorSite
from tests.fakes.raw_pushes import OCI_MANIFEST, digest_of, image

CONFIG = b"{}"


def push(site: MirrorSite, repo: str) -> str:
    """Pushes an image without layers. Returns its digest."""
    site.http.post(f"/v2/{repo}/blobs/uploads/", params={"digest": digest_of(CONFIG)}, content=CONFIG)
    body = image(CONFIG)
    answer = site.http.put(f"/v2/{repo}/manifests/1", content=body, headers={"content-type": OCI_MANIFEST})
    assert answer.status_code == 201, answer.text
    return digest_of(body)


def record(site: MirrorSite, repo: str, digest: str) -> PullRecord | None:
    """Returns the stored count and time of an image's pulls. The server must not run."""

    async def read() -> PullRecord | None:
        async with open_registry(site.server.data) as store:
            return await store.pulls.record_of(RepositoryName(repo), Digest(digest))

    return asyncio.run(read())


def test_pulls_of_pushed_images_are_counted(site: MirrorSite) -> None:
    """The server counts the pulls of both workers, including those that the response cache serves, and stores the
    counts when it stops."""
    site.start()
    digest = push(site, "team/app")
    for pid in site.server.worker_pids():
        for _ in range(5):
            answer = site.get("/v2/team/app/manifests/1", worker=pid).wait_for_end()
            assert answer.status == 200
    for _ in range(10):
        assert site.http.head("/v2/team/app/manifests/1").status_code == 200
    assert site.server.stop() == 0
    pull_record = record(site, "team/app", digest)
    assert pull_record is not None
    assert (pull_record.upstream, pull_record.pulls) == ("", 20)  # five GETs at each worker, and ten HEADs


def test_pulls_of_mirrored_images_are_counted(site: MirrorSite) -> None:
    """Pulls of a mirrored image under any of its names are counted together. The download by `mirror warm`, which fills
    the cache in advance, does not count as a pull."""
    site.start()
    config = str(site.folder / "entrepot.toml")
    entrepot_output("mirror", "warm", f"{REPO}:1", "--config", config, "--platform", "all", folder=site.folder)
    for pid in site.server.worker_pids():
        for name in ("app", "library/app", "docker.io/app", "docker.io/library/app"):
            assert site.get(f"/v2/{name}/manifests/1", worker=pid).wait_for_end().status == 200
    assert site.http.get("/v2/library/app/manifests/1?ns=docker.io").status_code == 200
    digest = site.get_manifest().headers["docker-content-digest"]
    assert site.server.stop() == 0
    pull_record = record(site, "docker.io/library/app", digest)
    assert pull_record is not None
    assert (pull_record.upstream, pull_record.pulls) == ("docker.io", 10)  # four at each worker, and two at the end


def test_warmed_image_has_a_record_with_no_pulls(site: MirrorSite) -> None:
    """`mirror warm` makes a record with zero pulls for each image that it fetches. So an image that nobody has pulled
    yet is among the least recently pulled images."""
    site.start()
    config = str(site.folder / "entrepot.toml")
    entrepot_output("mirror", "warm", f"{REPO}:1", "--config", config, "--platform", "all", folder=site.folder)
    assert site.server.stop() == 0
    pull_record = record(site, "docker.io/library/app", site.image.digest)
    assert pull_record is not None
    assert (pull_record.upstream, pull_record.pulls) == ("docker.io", 0)
