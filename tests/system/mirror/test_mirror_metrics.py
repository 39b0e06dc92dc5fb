"""What the metrics and the log say about a mirror."""

from __future__ import annotations

import re

from tests.fakes.metrics_reader import scrape
from tests.fakes.mirror_site import REPO, MirrorSite

ALLOWED = '[metrics]\nallow = ["127.0.0.0/8"]\ndistribution_names = true\n'
OF = {"upstream": "docker.io"}


def test_where_answers_were_found(site: MirrorSite) -> None:
    """The metrics say where responses were found, first at the upstream and then in the cache, how many bytes were
    fetched and served, and that no fill is running."""
    site.start(settings='tag_ttl = "1h"\nprefetch = "off"', more=ALLOWED)
    manifest = site.inspect().content
    for _ in range(2):
        assert site.inspect().content == manifest
    for _ in range(3):
        assert site.http.get(f"/v2/{REPO}/blobs/{site.digest}").content == site.blob
    assert site.http.get(f"/v2/{REPO}/manifests/none").status_code == 404
    found = scrape(site.server.url)
    requests = "entrepot_mirror_requests_total"
    assert found.total(requests, route="manifests", cache="hit", **OF) == 2
    assert found.total(requests, route="manifests", cache="miss", **OF) == 2  # one of them was not found
    assert found.total(requests, route="blobs", cache="miss", **OF) == 1
    assert found.total(requests, route="blobs", cache="hit", **OF) == 2
    assert found.total(requests) == found.total(requests, **OF) == 7
    fetched, served = "entrepot_mirror_fetched_bytes_total", "entrepot_mirror_served_bytes_total"
    assert found.total(fetched, content="blob", **OF) == site.size
    assert found.total(fetched, content="manifest", **OF) == len(manifest)
    assert found.total(served, route="blobs", cache="hit", **OF) == 2 * site.size
    assert found.total("entrepot_mirror_fills_total", outcome="stored", **OF) >= 1
    assert found.total("entrepot_mirror_fills_running", **OF) == 0
    assert found.total("entrepot_upstream_response_duration_seconds_count", **OF) >= 3
    assert found.total("entrepot_upstream_open_breakers", **OF) == 0
    assert found.total("registry_proxy_requests_total", type="blob") == 3
    assert found.total("registry_proxy_hits_total", type="blob") == 2
    assert found.total("registry_proxy_misses_total", type="blob") == 1
    assert found.total("registry_proxy_pulled_bytes_total", type="blob") == site.size
    assert found.total("registry_proxy_pushed_bytes_total", type="blob") == 3 * site.size


def test_a_confirmed_tag_is_revalidated(site: MirrorSite) -> None:
    """If the upstream was asked and the cached copy was current, the response counts as revalidated."""
    site.start(settings='tag_ttl = "0s"', more=ALLOWED)
    for _ in range(3):
        site.inspect()
    found = scrape(site.server.url)
    assert found.total("entrepot_mirror_requests_total", route="manifests", cache="miss", **OF) == 1
    assert found.total("entrepot_mirror_requests_total", route="manifests", cache="revalidated", **OF) == 2


def test_an_upstream_that_is_down(site: MirrorSite) -> None:
    """Cached content counts as stale, the errors of the upstream are counted by kind, and its circuit breaker is
    open."""
    site.start(settings='tag_ttl = "0s"', more=ALLOWED)
    site.inspect()
    site.hub.fault(on="any", method="", status=503, times=None)
    for _ in range(8):
        site.inspect()
    found = scrape(site.server.url)
    assert found.total("entrepot_mirror_requests_total", route="manifests", cache="stale", **OF) == 8
    assert found.total("entrepot_upstream_errors_total", kind="unavailable", **OF) >= 3
    assert found.total("entrepot_upstream_open_breakers", **OF) >= 1


def test_the_log_says_where_the_answer_was_found(site: MirrorSite) -> None:
    """The log line of a request says where the response was found."""
    site.start(settings='tag_ttl = "1h"', more=ALLOWED)
    for _ in range(2):
        site.inspect()
    site.server.stop()
    lines = re.findall(rf"GET /v2/{REPO}/manifests/1 status=200 .* cache=(\S+)", site.server.log_text())
    assert lines == ["miss", "hit"]
