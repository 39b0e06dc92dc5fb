"""Tests of the metrics and of the access log of a mirror."""

from __future__ import annotations

import re

from tests.fakes.metrics_reader import scrape
from tests.fakes.mirror_site import REPO, MirrorSite

# Settings that enable the metrics, also those with the names of the distribution registry.
METRICS_SETTINGS = '[metrics]\nallow = ["127.0.0.0/8"]\ndistribution_names = true\n'
DOCKER_IO = {"upstream": "docker.io"}


def test_cache_hits_and_misses_are_counted(site: MirrorSite) -> None:
    """The metrics count responses by where the mirror found the content: first at the upstream (`miss`), then in the
    cache (`hit`). They also count the fetched and the served bytes, and the running downloads of blobs (fills), here
    none."""
    site.start(settings='tag_ttl = "1h"\nprefetch = "off"', more=METRICS_SETTINGS)
    manifest = site.get_manifest().content
    for _ in range(2):
        assert site.get_manifest().content == manifest
    for _ in range(3):
        assert site.http.get(f"/v2/{REPO}/blobs/{site.digest}").content == site.blob
    assert site.http.get(f"/v2/{REPO}/manifests/none").status_code == 404
    metrics = scrape(site.server.url)
    requests = "entrepot_mirror_requests_total"
    assert metrics.total(requests, route="manifests", cache="hit", **DOCKER_IO) == 2
    assert metrics.total(requests, route="manifests", cache="miss", **DOCKER_IO) == 2  # the second one is the 404
    assert metrics.total(requests, route="blobs", cache="miss", **DOCKER_IO) == 1
    assert metrics.total(requests, route="blobs", cache="hit", **DOCKER_IO) == 2
    assert metrics.total(requests) == metrics.total(requests, **DOCKER_IO) == 7
    fetched, served = "entrepot_mirror_fetched_bytes_total", "entrepot_mirror_served_bytes_total"
    assert metrics.total(fetched, content="blob", **DOCKER_IO) == site.size
    assert metrics.total(fetched, content="manifest", **DOCKER_IO) == len(manifest)
    assert metrics.total(served, route="blobs", cache="hit", **DOCKER_IO) == 2 * site.size
    assert metrics.total("entrepot_mirror_fills_total", outcome="stored", **DOCKER_IO) >= 1
    assert metrics.total("entrepot_mirror_fills_running", **DOCKER_IO) == 0
    assert metrics.total("entrepot_upstream_response_duration_seconds_count", **DOCKER_IO) >= 3
    assert metrics.total("entrepot_upstream_open_breakers", **DOCKER_IO) == 0
    assert metrics.total("registry_proxy_requests_total", type="blob") == 3
    assert metrics.total("registry_proxy_hits_total", type="blob") == 2
    assert metrics.total("registry_proxy_misses_total", type="blob") == 1
    assert metrics.total("registry_proxy_pulled_bytes_total", type="blob") == site.size
    assert metrics.total("registry_proxy_pushed_bytes_total", type="blob") == 3 * site.size


def test_revalidated_tags_are_counted(site: MirrorSite) -> None:
    """If the mirror asked the upstream about a cached tag and the cached manifest was still current, the metrics count
    the response as `revalidated`."""
    site.start(settings='tag_ttl = "0s"', more=METRICS_SETTINGS)
    for _ in range(3):
        site.get_manifest()
    metrics = scrape(site.server.url)
    assert metrics.total("entrepot_mirror_requests_total", route="manifests", cache="miss", **DOCKER_IO) == 1
    assert metrics.total("entrepot_mirror_requests_total", route="manifests", cache="revalidated", **DOCKER_IO) == 2


def test_stale_responses_and_upstream_errors_are_counted(site: MirrorSite) -> None:
    """While the upstream fails, the metrics count responses from the cache as `stale` and count the errors of the
    upstream by kind. They also report an open circuit breaker, with which the mirror stops sending requests to the
    upstream."""
    site.start(settings='tag_ttl = "0s"', more=METRICS_SETTINGS)
    site.get_manifest()
    site.hub.fault(on="any", method="", status=503, times=None)  # for requests with any method
    for _ in range(8):
        site.get_manifest()
    metrics = scrape(site.server.url)
    assert metrics.total("entrepot_mirror_requests_total", route="manifests", cache="stale", **DOCKER_IO) == 8
    assert metrics.total("entrepot_upstream_errors_total", kind="unavailable", **DOCKER_IO) >= 3
    assert metrics.total("entrepot_upstream_open_breakers", **DOCKER_IO) >= 1


def test_log_line_has_the_cache_result(site: MirrorSite) -> None:
    """The access log line of a request says with `cache=` whether the response came from the upstream or from the
    cache."""
    site.start(settings='tag_ttl = "1h"', more=METRICS_SETTINGS)
    for _ in range(2):
        site.get_manifest()
    site.server.stop()
    cache_results = re.findall(rf"GET /v2/{REPO}/manifests/1 status=200 .* cache=(\S+)", site.server.log_text())
    assert cache_results == ["miss", "hit"]
