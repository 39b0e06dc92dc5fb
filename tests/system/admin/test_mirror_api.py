"""Tests of `/api/v1/mirror`: the state of the mirror, and changes of its cache."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.fakes.admin_site import AdminSite, code_of
from tests.fakes.hub.hub import Hub
from tests.system.admin.conftest import MIRRORED, WARMED

WARM = "docker.io/library/warm"
"""The repository of the image `WARMED`."""


def wait_for_end(site: AdminSite, job: dict[str, Any]) -> dict[str, Any]:
    """Waits for the end of the job, and returns the job."""
    deadline = time.monotonic() + 60
    while job["ended"] is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        job = site.call_ok("GET", f"/jobs/{job['id']}")
    return job


def images(site: AdminSite, **query: Any) -> list[dict[str, Any]]:
    """Returns the cached images that match the query."""
    found: list[dict[str, Any]] = site.call_ok("GET", "/mirror/images", **query)["items"]
    return found


def test_warm_list_refresh_and_purge(mirror_site: AdminSite, upstream: Hub) -> None:
    """A warm job fetches an image into the cache. The API lists the download while it runs, and then the image.
    A second job fetches nothing. A job for a missing image fails. A refresh checks the tag at the upstream. A purge
    deletes the image."""
    site = mirror_site
    body = {"references": ["warm:1", f"{WARM}:2"], "platforms": ["all"]}
    layer = WARMED.layers[-1]
    upstream.fault(stall_after=layer.size // 2, match=layer.digest.partition(":")[2])
    job = site.call_ok("POST", "/mirror/warm", body)
    upstream.until(lambda: [each["digest"] for each in site.call_ok("GET", "/mirror/downloads")] == [layer.digest])
    (download,) = site.call_ok("GET", "/mirror")["fills"]
    assert (download["digest"], download["size"], download["running"]) == (layer.digest, layer.size, True)
    upstream.release()
    job = wait_for_end(site, job)
    assert (job["state"], job["unit"]) == ("done", "bytes")
    upstream.until(lambda: not site.call_ok("GET", "/mirror/downloads"))
    size = sum(layer.size for layer in WARMED.layers)
    assert job["done"] == job["total"] >= size
    assert [result["image"] for result in job["result"]["results"]] == ["warm:1", f"{WARM}:2"]
    second_job = wait_for_end(site, site.call_ok("POST", "/mirror/warm", body))
    assert {result["fetched"] for result in second_job["result"]["results"]} == {0}
    failed_job = wait_for_end(
        site, site.call_ok("POST", "/mirror/warm", {"references": ["nothing:here"], "platforms": ["all"]})
    )
    assert (failed_job["state"], failed_job["message"] != "") == ("failed", True)

    (image,) = images(site, text="WARM", upstream="docker.io")
    assert (image["repository"], image["digest"], image["tags"]) == (WARM, WARMED.digest, ["1", "2"])
    assert image["size"] >= size
    assert image["frozen_tags"] == []
    site.call_ok("PUT", "/mirror/frozen", {"reference": f"{WARM}:2"})
    assert images(site, text="warm")[0]["frozen_tags"] == ["2"]
    refreshed = site.call_ok("POST", "/mirror/refresh", {"reference": f"{WARM}:1"})
    assert (refreshed["outcome"], refreshed["digest"]) == ("unchanged", WARMED.digest)
    assert site.call_ok("POST", "/mirror/refresh", {"reference": f"{WARM}:2"})["outcome"] == "frozen"

    state = site.call_ok("GET", "/mirror")
    (upstream_state,) = state["upstreams"]
    assert (upstream_state["name"], len(upstream_state["endpoints"])) == ("docker.io", 1)
    assert [part["upstream"] for part in state["cache"]] == ["docker.io", None]
    assert state["cache"][0]["size"] >= size

    refused = site.call("POST", "/mirror/purge", {"reference": f"{WARM}@{WARMED.digest}"})
    assert (refused.status_code, code_of(refused)) == (403, "DENIED")
    site.call_ok("DELETE", "/mirror/frozen", reference=f"{WARM}:2")
    purged = site.call_ok("POST", "/mirror/purge", {"reference": f"{WARM}@{WARMED.digest}"})
    assert (purged["tags"], purged["manifests"]) == (2, 1)
    assert purged["size"] >= size
    assert images(site, text="warm") == []
    assert site.call("POST", "/mirror/purge", {"reference": f"{WARM}:1"}).status_code == 404
    lines = site.call_ok("GET", "/audit", target=f"{WARM}:1")["items"]
    assert "root" in {line["actor"] for line in lines}


def test_who_may_change_the_cache(mirror_site: AdminSite) -> None:
    """An account with the action `admin` on a repository may refresh and purge its cached content. All other routes
    are for admins only."""
    site = mirror_site
    user = site.user()
    site.call_ok("PUT", "/grants", {"subject": f"user:{user[0]}", "pattern": "docker.io/team/**", "actions": ["admin"]})
    fetched = site.call_ok("POST", "/mirror/refresh", {"reference": "docker.io/team/app:1"}, auth=user)
    assert (fetched["outcome"] in ("new", "unchanged"), fetched["digest"]) == (True, MIRRORED.digest)
    purged = site.call_ok("POST", "/mirror/purge", {"reference": "docker.io/team/app", "everything": True}, auth=user)
    assert purged["manifests"] == 1
    for path, body in (
        ("/mirror/refresh", {"reference": "app:1"}),
        ("/mirror/purge", {"reference": "app:1"}),
        ("/mirror/warm", {"references": ["docker.io/team/app:1"]}),
    ):
        refused = site.call("POST", path, body, auth=user)
        assert (refused.status_code, code_of(refused)) == (403, "DENIED")
    for path in ("/mirror", "/mirror/images", "/mirror/downloads"):
        assert site.call("GET", path, auth=user).status_code == 403


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/mirror/warm", {"references": []}, 422),
        ("/mirror/warm", {"references": ["UPPER"]}, 400),
        ("/mirror/warm", {"references": ["app"], "platforms": ["neither"]}, 400),
        ("/mirror/refresh", {"reference": "app:"}, 400),
        ("/mirror/refresh", {"reference": "hosted.example/app:1"}, 404),
        ("/mirror/purge", {"reference": "x" * 601}, 422),
        ("/mirror/purge", {"reference": "never-pulled:1"}, 404),
    ],
)
def test_bad_input(mirror_site: AdminSite, path: str, body: dict[str, Any], status: int) -> None:
    """An invalid or unknown reference gets an error."""
    assert mirror_site.call("POST", path, body).status_code == status
