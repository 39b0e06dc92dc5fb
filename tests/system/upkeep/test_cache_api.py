"""Tests of `/api/v1/cache` and `/api/v1/quotas` with a real server that mirrors a fake Docker Hub."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite, code_of
from tests.fakes.commands import entrepot_output
from tests.fakes.mirror_site import MirrorSite, wait_until
from tests.fakes.upstream_content import noise_image


@pytest.mark.slow
def test_cache_and_quotas_in_the_api(site: MirrorSite) -> None:
    """The API lists the cache of each upstream, the whole cache, and the quotas. An eviction runs as a job. A dry run
    lists the images that the next eviction then evicts."""
    images = [site.content.add(f"library/app{n}", noise_image(f"app{n}", 1000 * n), "1") for n in (1, 2, 3)]
    quota = '[[quota]]\nprefix = "team/"\nmax_size = "1MiB"\n'
    site.start(1000, more=f'[cache]\nmax = "1GiB"\n{quota}', settings='prefetch = "off"\ncache_max = "1MiB"')
    for number, image in enumerate(images, 1):
        site.http.get(f"/v2/library/app{number}/manifests/1")
        for digest in image.blobs:
            assert site.http.get(f"/v2/library/app{number}/blobs/{digest}").status_code == 200
    entrepot_output(
        *("user", "add", ADMIN, "--admin", "--password-file", "-", "--data", "data"),
        folder=site.folder,
        stdin_text=PASSWORD,
    )
    api = AdminSite(site.server, site.folder)
    sizes = [sum(blob.size for blob in image.blobs.values()) for image in images]

    wait_until(lambda: all(part["complete"] for part in api.call_ok("GET", "/cache")), "the cache to be counted")
    [hub, whole_cache] = api.call_ok("GET", "/cache")
    assert (hub["upstream"], hub["size"], hub["max_size"], hub["images"]) == ("docker.io", sum(sizes), 1 << 20, 3)
    assert (whole_cache["upstream"], whole_cache["size"], whole_cache["max_size"]) == (None, sum(sizes), 1 << 30)
    assert api.call_ok("GET", "/quotas") == [
        {"prefix": "team/", "size": 0, "max_size": 1 << 20, "tags": 0, "max_tags": None, "blobs": 0, "complete": True}
    ]

    def evict(**body: Any) -> Any:
        job = api.call_ok("POST", "/cache/evict", body)["id"]
        wait_until(lambda: api.call_ok("GET", f"/jobs/{job}")["ended"] is not None, "the job to end")
        ended = api.call_ok("GET", f"/jobs/{job}")
        assert (ended["state"], ended["started_by"]) == ("done", ADMIN)
        for image in ended["result"]["evicted"]:
            del image["last_pulled"]  # the pulls above are stored after some seconds, perhaps between two jobs
        return ended["result"]

    plan = evict(to=sizes[2], dry_run=True)
    assert [image["repository"] for image in plan["evicted"]] == [f"docker.io/library/app{n}" for n in (1, 2)]
    assert api.call_ok("GET", "/cache")[0]["images"] == 3
    assert evict(to=sizes[2], upstream="docker.io") == {**plan, "dry_run": False}
    assert api.call_ok("GET", "/cache")[0]["size"] == sizes[2]
    assert evict()["images"] == 0

    refused = api.call("POST", "/cache/evict", {"upstream": "ghcr.io"})
    assert (refused.status_code, code_of(refused)) == (404, "NAME_UNKNOWN")
    assert api.call("POST", "/cache/evict", {"too": 5}).status_code == 422
    assert api.call("POST", "/cache/evict", {"to": -1}).status_code == 422
    user = api.user()
    for method, path in (("GET", "/cache"), ("GET", "/quotas"), ("POST", "/cache/evict")):
        assert api.call(method, path, {} if method == "POST" else None, auth=user).status_code == 403
