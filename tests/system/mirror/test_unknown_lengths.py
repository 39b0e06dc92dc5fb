"""Blobs can be pulled from an upstream that does not state their length, such as one behind a proxy that sends each
body on in chunks. The mirror then takes the size from the manifest."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Literal

import pytest

from tests.fakes.client_images import MIB
from tests.fakes.mirror_site import REPO, SIZE, MirrorSite, wait_until
from tests.fakes.upstream_content import ImageTree, UpstreamBlob, manifest_of, noise_blob
from tests.system.mirror.test_private_blobs import (
    ATTACKER_REPO,
    LAYER,
    PARTNER_REPO,
    SECRET_REPO,
    blob,
    pull,
)
from tests.system.mirror.test_private_blobs import start as start_private
from tests.system.mirror.test_private_upstream import account

SIZES = (30_000, SIZE, 12 * MIB)
"""A blob that clients get when it is complete, one that is fetched with one request, and one that is fetched in
pieces if the upstream sends ranges."""
OTHER_REPO = "library/other"
NO_PREFETCH = 'prefetch = "off"'


def image_with_wrong_size(layer: UpstreamBlob, size: int) -> ImageTree:
    """Returns an image whose manifest states `size` as the size of its layer."""
    tree = manifest_of(UpstreamBlob(b"{}", "application/vnd.oci.image.config.v1+json"), layer)
    document = json.loads(tree.body)
    document["layers"][0]["size"] = size
    return replace(tree, body=json.dumps(document).encode())


@pytest.mark.parametrize("ending", ["chunked", "close"])
@pytest.mark.parametrize("ranges", ["honoured", "ignored", "refused"])
def test_cold_pull_without_lengths(
    site: MirrorSite, ranges: Literal["honoured", "ignored", "refused"], ending: Literal["chunked", "close"]
) -> None:
    """If responses of the upstream have no Content-Length, neither to GET nor to HEAD, blobs that a cached manifest
    names can be pulled, whether the upstream honours, ignores or refuses ranges. Responses of the mirror have a
    Content-Length, and ranges of blobs can be requested."""
    site.start(*SIZES, settings=NO_PREFETCH, rechunked=True)
    site.proxy.ranges, site.proxy.ending, site.proxy.head_lengths = ranges, ending, False
    site.get_manifest()
    for layer in site.image.layers:
        path = f"/v2/{REPO}/blobs/{layer.digest}"
        assert site.http.head(path).headers["content-length"] == str(layer.size)
        part = site.get(path, span="20000-29999").wait_for_end()
        assert (part.status, bytes(part.body)) in ((206, layer.read(20000, 30000)), (200, layer.read()))
        for _ in range(2):
            reader = site.get(path).wait_for_end()
            assert reader.is_complete
            assert reader.body == layer.read()
    site.hub.refuse()
    assert site.get(span="-10").wait_for_end().body == site.blob[-10:]


def test_blob_that_no_manifest_names(site: MirrorSite) -> None:
    """A blob that no cached manifest names can be pulled if the upstream states its length in any response: to HEAD, or
    to GET although it refuses ranges. Otherwise the client gets 502."""
    site.start(*SIZES, settings=NO_PREFETCH, rechunked=True)
    site.proxy.ranges = "refused"
    small, middle, large = site.image.layers
    assert site.get(f"/v2/{REPO}/blobs/{small.digest}").wait_for_end().body == small.read()
    site.proxy.head_lengths, site.proxy.get_lengths = False, True
    assert site.get(f"/v2/{REPO}/blobs/{middle.digest}").wait_for_end().body == middle.read()
    site.proxy.get_lengths = False
    assert site.get(f"/v2/{REPO}/blobs/{large.digest}").wait_for_end().status == 502


@pytest.mark.parametrize("error", [1, -1])
@pytest.mark.parametrize("size", [30_000, SIZE])
def test_wrong_size_in_a_manifest(site: MirrorSite, size: int, error: int) -> None:
    """If a manifest states a wrong size, no client gets a complete response with that size. The upstream is not
    blamed: through a repository whose manifest states the right size, the blob can be pulled at once, also while the
    other repository is being pulled from. Of a small blob, clients get the right bytes through both repositories if the
    upstream states the length in its response to HEAD."""
    layer = noise_blob("wrong", size)
    site.content.add(REPO, image_with_wrong_size(layer, size + error), "wrong")
    site.content.add(OTHER_REPO, manifest_of(UpstreamBlob(b"{}", "application/x"), layer), "1")
    site.start(settings=NO_PREFETCH, rechunked=True)
    site.get_manifest("wrong")
    assert site.http.get(f"/v2/{OTHER_REPO}/manifests/1").status_code == 200
    path, other_path = (f"/v2/{repo}/blobs/{layer.digest}" for repo in (REPO, OTHER_REPO))
    for _ in range(3):
        reader = site.get(path).wait_for_end()
        assert reader.body == layer.read() if size == 30_000 else not reader.is_complete
    assert site.get(other_path).wait_for_end().body == layer.read()


@pytest.mark.parametrize("media_type", ["text/html; charset=utf-8", "application/json"])
def test_page_in_place_of_a_blob(site: MirrorSite, media_type: str) -> None:
    """If the upstream sends a page with status 200 in place of a blob, without a length, no client gets a complete
    response. The bytes are not kept: the next request gets the blob, as soon as the upstream sends it. A page in HTML
    is refused before any client gets a byte of it."""
    site.start(settings=NO_PREFETCH, rechunked=True)
    site.get_manifest()
    site.proxy.page = media_type, b"<html>please log in</html>" * 20_000
    reader = site.get().wait_for_end()
    assert reader.status == 502 or not reader.is_complete
    assert reader.status == 502 or "html" not in media_type
    wait_until(lambda: not site.stored_files(), "wrong bytes are kept")
    site.proxy.page = None
    assert site.get().wait_for_end().body == site.blob


def test_next_endpoint_is_used_after_a_page(site: MirrorSite) -> None:
    """If the first endpoint sends an HTML page without a length in place of a blob, the next endpoint is asked."""
    site.start(settings=NO_PREFETCH, endpoints=2, rechunked=True)
    site.get_manifest()
    site.proxy.page = "text/html", b"<html>please log in</html>"
    assert site.get().wait_for_end().body == site.blob


def test_private_upstream_without_lengths(site: MirrorSite) -> None:
    """A private upstream that states no length confirms that a repository has a blob by naming the blob's digest in its
    response. Then the blob can be pulled through this repository, also if it is stored already. Through a repository
    that does not have it at the upstream, it cannot."""
    start_private(site, auth="basic", rechunked=True)
    site.proxy.head_lengths = False
    reader = account(site, "reader", "docker.io/**")
    assert pull(site, SECRET_REPO, reader).body == LAYER.read()
    gets = len(site.proxy.ranges_requested)
    assert pull(site, PARTNER_REPO, reader).body == LAYER.read()
    assert site.proxy.ranges_requested[gets:] == ["bytes=0-0"]
    assert pull(site, ATTACKER_REPO, reader).status == 404


def test_private_upstream_without_lengths_and_digests(site: MirrorSite) -> None:
    """If a private upstream states neither the length nor the digest of a blob, its response is possibly a login page.
    So it confirms nothing, and the client gets 502, also if the blob is stored for another repository."""
    start_private(site, auth="basic", rechunked=True)
    reader = account(site, "reader", "docker.io/**")
    assert pull(site, SECRET_REPO, reader).body == LAYER.read()
    site.proxy.head_lengths = site.proxy.digests = False
    assert pull(site, PARTNER_REPO, reader).status == 502
    assert site.http.head(blob(PARTNER_REPO), headers=reader).status_code == 502
