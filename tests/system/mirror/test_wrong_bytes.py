"""Corrupt bytes: no response with a blob's last byte contains them, and none are stored."""

from __future__ import annotations

import pytest

from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import union
from tests.fakes.mirror_site import REPO, SIZE, MirrorSite, wait_until

PLACES = pytest.mark.parametrize("place", [0, SIZE // 2, SIZE - 1], ids=["first", "middle", "last"])


@PLACES
def test_a_wrong_byte(site: MirrorSite, place: int) -> None:
    """Clients are cut off before the last byte, at both workers, for the whole blob and for ranges. Nothing is stored,
    and the next request gets the right bytes."""
    site.start(settings='prefetch = "off"')
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, corrupt=place, stall_after=MIB)
    workers = site.server.worker_pids()
    # These clients read when the fill ends; later ones would start a new one.
    readers = [site.get(worker=pid).reached(MIB) for pid in workers]
    readers += [site.get(span=span, worker=pid).answered() for pid in workers for span in ("-1", "-1000", "100-")]
    site.hub.release()
    for reader in readers:
        assert not reader.ended().whole
    wait_until(lambda: not site.kept(), "wrong bytes are kept")
    assert site.get().ended().body == site.blob
    assert site.get(span="-1000").ended().body == site.blob[-1000:]


def test_a_wrong_byte_in_one_of_many_pieces(site: MirrorSite) -> None:
    """Clients are cut off in the same way if the blob is fetched over several connections."""
    site.start(1000, 12 * MIB, settings='prefetch = "off"')
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, corrupt=7 * MIB)
    assert not site.get().ended().whole
    wait_until(lambda: not site.kept(), "wrong bytes are kept")
    assert site.get().ended().body == site.blob


def test_the_next_endpoint_is_tried(site: MirrorSite) -> None:
    """After corrupt bytes from one endpoint, a retry at any worker gets the blob from the next endpoint."""
    site.start(settings='prefetch = "off"', endpoints=2)
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, corrupt=0, times=None)
    first, second = site.server.worker_pids()
    assert not site.get(worker=first).ended().whole
    assert site.get(worker=second).ended().body == site.blob
    assert site.get(worker=first).ended().body == site.blob
    assert union(site.other.sent(site.digest)) == [(0, SIZE)]


def test_a_small_blob_comes_right_at_once(site: MirrorSite) -> None:
    """A small blob is verified before it is served: the client does not see the corrupt bytes."""
    site.start(settings='prefetch = "off"', endpoints=2)
    site.inspect()
    digest = site.image.layers[0].digest
    site.hub.fault(on="blob", match=digest.partition(":")[2], corrupt=500, times=None)
    assert site.get(f"/v2/{REPO}/blobs/{digest}").ended().body == site.image.layers[0].read()


def test_a_wrong_manifest(site: MirrorSite) -> None:
    """A corrupt manifest is not served, by tag or by digest; the next response of the upstream can be right."""
    site.start(settings='prefetch = "off"')
    for reference in (site.image.digest, "1"):
        site.hub.fault(on="manifest", corrupt=20)
        answer = site.http.get(f"/v2/{REPO}/manifests/{reference}")
        assert (answer.status_code, answer.json()["errors"][0]["code"]) == (502, "UNAVAILABLE")
        assert site.http.get(f"/v2/{REPO}/manifests/{reference}").content == site.image.body
        site.http.delete(f"/v2/{REPO}/manifests/{site.image.digest}")


def test_a_wrong_manifest_with_another_endpoint(site: MirrorSite) -> None:
    """With another endpoint, clients notice nothing."""
    site.start(settings='prefetch = "off"', endpoints=2)
    site.hub.fault(on="manifest", corrupt=20, times=None)
    assert site.inspect().content == site.image.body
    assert site.asked("manifest", far=site.other) == 1


def errors(site: MirrorSite) -> list[str]:
    """Returns the error lines of the server's log."""
    return [line for line in site.server.log_text().splitlines() if " ERROR " in line]


def test_wrong_bytes_are_one_line_in_the_log(site: MirrorSite) -> None:
    """However many clients are cut off at both workers, one line names the endpoint, the repository and the digest. A
    cut connection is not logged as a crash."""
    site.start(settings='prefetch = "off"')
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, corrupt=5, stall_after=MIB)
    readers = [site.get(worker=pid).reached(MIB) for pid in site.server.worker_pids() for _ in range(4)]
    site.hub.release()
    for reader in readers:
        assert not reader.ended().whole
    site.server.stop()
    assert "Traceback" not in site.server.log_text()
    (line,) = errors(site)
    assert all(part in line for part in (site.hub.url, f"docker.io/{REPO}", site.digest)), line


def test_a_client_that_comes_again_at_once(site: MirrorSite) -> None:
    """The client is told which upstream sent corrupt bytes for which content, and when to retry. Until then the
    upstream is not contacted. After a repair the blob can be pulled within seconds."""
    site.start(settings='prefetch = "off"')
    site.inspect()
    site.hub.fault(on="blob", match=site.encoded, corrupt=5, times=None)
    answer = site.get().ended()
    for _ in range(5):
        if answer.status == 502:
            break
        assert not answer.whole
        answer = site.get().ended()
    assert (answer.status, answer.headers["cache-control"]) == (502, "no-store")
    assert 1 <= int(answer.headers["retry-after"]) <= 3
    text = answer.body.decode()
    assert all(part in text for part in ("docker.io", site.hub.url, site.digest, "entrepot mirror refresh")), text
    asked = site.asked("blob")
    assert asked <= 2
    for worker in site.server.worker_pids():
        assert site.get(worker=worker).ended().status == 502
    assert site.asked("blob") == asked
    site.hub.clear()
    wait_until(lambda: site.get().ended().body == site.blob, "the right bytes")
