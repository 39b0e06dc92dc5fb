"""Tests that the fake Docker Hub serves content as a registry does. Many other tests rely on this."""

from __future__ import annotations

import hashlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

from tests.fakes.client_images import DOCKER_CONFIG, DOCKER_LAYER, DOCKER_LIST, DOCKER_MANIFEST, MIB
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.server_process import ROOT
from tests.fakes.upstream_content import (
    ImageTree,
    Noise,
    UpstreamContent,
    fallback_index,
    fallback_tag,
    noise_image,
    ubuntu,
)
from tests.system.fakes.conftest import REPO, SIZE, ask, bearer, blob_url, manifest_url, token_for


def test_manifests_by_tag_and_by_digest_are_byte_exact(
    upstream: Hub, client: httpx2.Client, hub_image: ImageTree
) -> None:
    """The responses to GET and HEAD of a manifest have the digest, the media type and the length. An unknown tag gets
    404. The fake Hub records the requests."""
    for reference in ("1", hub_image.digest):
        got = client.get(manifest_url(upstream, reference))
        head = client.head(manifest_url(upstream, reference))
        assert got.content == hub_image.body
        for answer in (got, head):
            assert answer.headers["Docker-Content-Digest"] == hub_image.digest
            assert answer.headers["Content-Type"] == hub_image.media_type
            assert answer.headers["Content-Length"] == str(len(hub_image.body))
        assert head.content == b""
    missing = client.get(manifest_url(upstream, "none"))
    assert (missing.status_code, missing.json()["errors"][0]["code"]) == (404, "MANIFEST_UNKNOWN")
    assert upstream.count("manifest", "GET") == 3
    assert upstream.count("manifest", "HEAD", digest=hub_image.digest) == 2


def test_blobs_have_the_bytes_of_their_digest(upstream: Hub, client: httpx2.Client, hub_image: ImageTree) -> None:
    """Blobs are served with the right bytes, completely and by range. The fake Hub records exactly which bytes it has
    sent."""
    for blob in (hub_image.config, *hub_image.layers):
        whole = client.get(blob_url(upstream, blob.digest)).content
        assert "sha256:" + hashlib.sha256(whole).hexdigest() == blob.digest
        assert whole == blob.read()
        assert upstream.sent_ranges(blob.digest) == [(0, blob.size)]
    digest = hub_image.layers[1].digest
    for requested, start, stop in (
        ("5-", 5, SIZE),
        ("7-1500000", 7, 1500001),
        ("-9", SIZE - 9, SIZE),
        ("1-9999999", 1, SIZE),
    ):
        part = client.get(blob_url(upstream, digest), headers={"Range": f"bytes={requested}"})
        assert part.status_code == 206
        assert part.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{SIZE}"
        assert part.content == whole[start:stop]
        assert upstream.sent_ranges(digest)[-1] == (start, stop)
    beyond = client.get(blob_url(upstream, digest), headers={"Range": f"bytes={SIZE}-"})
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{SIZE}")
    assert [request.range for request in upstream.requests("blob", digest=digest)][1] == "bytes=5-"


def test_pieces_of_noise_are_consistent() -> None:
    """`Noise` is generated content that need not be stored. Any piece of it is equal to the same part of the whole
    content."""
    noise = Noise("n", 20 * MIB)
    whole = noise.read(0, noise.size)
    assert len(whole) == noise.size
    for start, stop in ((0, 1), (8388592, 8388595), (9 * MIB, 18 * MIB), (20 * MIB - 1, 20 * MIB)):
        assert noise.read(start, stop) == whole[start:stop]
    assert len({whole[start : start + 4096] for start in range(0, noise.size, MIB)}) == 20


def test_without_ranges(upstream: Hub, client: httpx2.Client, hub_image: ImageTree) -> None:
    """If the switch `ranges` is off, the header Range is ignored, and the response has no Accept-Ranges."""
    upstream.set(ranges=False)
    got = client.get(blob_url(upstream, hub_image.layers[0].digest), headers={"Range": "bytes=5-9"})
    assert (got.status_code, len(got.content)) == (200, 1000)
    assert "Accept-Ranges" not in got.headers


def test_tokens(upstream: Hub, client: httpx2.Client, hub_image: ImageTree) -> None:
    """A request without a token gets a 401 with a challenge. A token is accepted for as many requests as `token_uses`
    says, and only until it expires or is revoked. Then it is refused with `invalid_token`."""
    upstream.set(auth="bearer", token_uses=2, realm=f"{upstream.auth_url}/token")
    refused = client.get(manifest_url(upstream))
    assert refused.status_code == 401
    assert urlsplit(upstream.auth_url).hostname != urlsplit(upstream.url).hostname
    token = token_for(client, refused)
    assert token.json()["expires_in"] == 300
    answers = [client.get(manifest_url(upstream), headers=bearer(token)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 401]
    assert 'error="invalid_token"' in answers[2].headers["WWW-Authenticate"]
    assert upstream.count("token") == 1
    assert [request.authorization for request in upstream.requests("manifest")] == [False, True, True, True]
    valid = bearer(token_for(client, refused))
    upstream.set(token_seconds=0)
    expired = bearer(token_for(client, refused))
    assert client.head(manifest_url(upstream), headers=valid).status_code == 200
    assert client.head(manifest_url(upstream), headers=expired).status_code == 401
    upstream.revoke()
    assert client.head(manifest_url(upstream), headers=valid).status_code == 401


def test_logins(upstream: Hub, client: httpx2.Client) -> None:
    """A private repository needs the login that the test has set. A wrong login gets 401, from the token service or
    with Basic authentication."""
    upstream.set(auth="bearer", username="ann", password="right", private=(REPO,))
    refused = client.get(manifest_url(upstream))
    anonymous = client.get(manifest_url(upstream), headers=bearer(token_for(client, refused)))
    assert anonymous.status_code == 401
    assert 'error="insufficient_scope"' in anonymous.headers["WWW-Authenticate"]
    assert token_for(client, refused, ("ann", "wrong")).status_code == 401
    login_token = bearer(token_for(client, refused, ("ann", "right")))
    assert client.get(manifest_url(upstream), headers=login_token).status_code == 200
    other = client.get(manifest_url(upstream, repo="library/other"), headers=login_token)
    assert other.status_code == 401
    upstream.set(auth="basic")
    assert client.get(manifest_url(upstream), auth=("ann", "wrong")).status_code == 401
    assert client.get(manifest_url(upstream), auth=("ann", "right")).status_code == 200


def test_redirects_to_a_port_that_refuses_authorization(
    upstream: Hub, client: httpx2.Client, hub_image: ImageTree
) -> None:
    """With the switch `redirects`, a request for a blob is redirected to a second port, as to the CDN of Docker Hub.
    This port responds with 400 to requests with Authorization. A link can be used as often as `link_uses` says."""
    digest = hub_image.layers[1].digest
    upstream.set(redirects=True, link_uses=1)
    moved = client.get(blob_url(upstream, digest))
    assert moved.status_code == 307
    link = moved.headers["Location"]
    assert link.startswith(upstream.cdn_url)
    assert client.get(link, headers={"Authorization": "Bearer x"}).status_code == 400
    part = client.get(link, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, hub_image.layers[1].read(10, 20))
    assert client.get(link).status_code == 403
    assert [request.kind for request in upstream.requests(digest=digest)] == ["redirect", "blob", "blob", "blob"]
    assert upstream.sent_ranges(digest) == [(10, 20)]


def test_gzip(upstream: Hub, client: httpx2.Client, hub_image: ImageTree) -> None:
    """With the switch `gzip`, clients that accept gzip get compressed content, and other clients do not."""
    upstream.set(gzip=True)
    url = blob_url(upstream, hub_image.layers[0].digest)
    assert client.get(url).content == hub_image.layers[0].read()
    packed = client.get(url, headers={"Accept-Encoding": "zstd, gzip;q=0.5"})
    assert packed.headers["Content-Encoding"] == "gzip"
    assert packed.content == hub_image.layers[0].read()


def test_manifests_need_an_accepted_media_type(upstream: Hub, client: httpx2.Client, hub_image: ImageTree) -> None:
    """With the switch `negotiates`, a client gets a manifest only if its Accept headers have the media type of the
    manifest."""
    upstream.set(negotiates=True)
    assert client.get(manifest_url(upstream)).status_code == 404
    assert (
        client.get(manifest_url(upstream), headers={"Accept": f"x/y, {hub_image.media_type}"}).content == hub_image.body
    )
    several = [("Accept", "x/y"), ("Accept", hub_image.media_type), ("Accept", "y/z")]
    assert client.get(manifest_url(upstream), headers=several).content == hub_image.body


def test_pages_of_tags(upstream: Hub, client: httpx2.Client, hub_image: ImageTree) -> None:
    """Tags are listed in pages: in order, after the parameter `last`, and at most `n` or the switch `page` at a time.
    If there are more tags, the response has a Link header."""
    for tag in ("3", "2"):
        upstream.tag(REPO, tag, hub_image.digest)
    url = f"{upstream.url}/v2/{REPO}/tags/list"
    assert client.get(url).json() == {"name": REPO, "tags": ["1", "2", "3", "latest"]}
    found, link = [], "?n=3"
    while link:
        page = client.get(url + link)
        found.append(page.json()["tags"])
        more = page.headers.get("Link", "")
        assert not more or more.endswith('; rel="next"')
        link = more.partition("?")[2].partition(">")[0]
        link = f"?{link}" if link else ""
    assert found == [["1", "2", "3"], ["latest"]]
    upstream.set(page=1)
    assert client.get(url, params={"n": 9, "last": "2"}).json()["tags"] == ["3"]
    upstream.remove(REPO, hub_image.digest)
    assert client.get(url).json()["tags"] == []


def test_referrers_by_the_api_or_by_the_fallback_tag(
    upstream: Hub, client: httpx2.Client, hub_image: ImageTree
) -> None:
    """The referrers API lists referrers with their annotations, and can filter them by artifactType. With the switch
    `referrers` off, it responds with 404, and the fallback tag still lists them."""
    signature = noise_image("signature", 10, subject=hub_image, annotations={"by": "ann"})
    more = UpstreamContent()
    more.add(REPO, signature)
    more.add(REPO, fallback_index(signature), fallback_tag(hub_image.digest))
    upstream.put(more)
    url = f"{upstream.url}/v2/{REPO}/referrers/{hub_image.digest}"
    listed = client.get(url)
    assert listed.headers["Content-Type"] == "application/vnd.oci.image.index.v1+json"
    [entry] = listed.json()["manifests"]
    assert (entry["digest"], entry["annotations"]) == (signature.digest, {"by": "ann"})
    none = client.get(url, params={"artifactType": "application/none"})
    assert (none.json()["manifests"], none.headers["OCI-Filters-Applied"]) == ([], "artifactType")
    upstream.set(referrers=False)
    assert client.get(url).status_code == 404
    fallback = client.get(manifest_url(upstream, fallback_tag(hub_image.digest)))
    assert fallback.json()["manifests"] == [entry]


def test_an_image_of_several_platforms(upstream: Hub, client: httpx2.Client) -> None:
    """A manifest list, its two manifests and their blobs can be pulled, with docker's media types."""
    made = UpstreamContent()
    listed = made.add("library/ubuntu", ubuntu(), "18.04")
    upstream.put(made)
    answer = client.get(manifest_url(upstream, "18.04", "library/ubuntu"))
    assert answer.headers["Content-Type"] == DOCKER_LIST
    assert answer.content == listed.body
    assert [entry["platform"]["architecture"] for entry in answer.json()["manifests"]] == ["amd64", "arm64"]
    for entry in answer.json()["manifests"]:
        child = client.get(manifest_url(upstream, entry["digest"], "library/ubuntu"))
        assert child.headers["Content-Type"] == DOCKER_MANIFEST
        assert child.json()["config"]["mediaType"] == DOCKER_CONFIG
        assert {layer["mediaType"] for layer in child.json()["layers"]} == {DOCKER_LAYER}
        for blob in (child.json()["config"], *child.json()["layers"]):
            got = client.get(f"{upstream.url}/v2/library/ubuntu/blobs/{blob['digest']}").content
            assert len(got) == blob["size"]
            assert "sha256:" + hashlib.sha256(got).hexdigest() == blob["digest"]


def test_unknown_content(upstream: Hub, client: httpx2.Client, hub_image: ImageTree) -> None:
    """An unknown repository gets 404, and so does a blob that only another repository has. With the switch
    `hide_unknown`, an unknown repository gets 401, as at Docker Hub."""
    other = UpstreamContent()
    other.add("library/other", noise_image("other", 10), "1")
    upstream.put(other)
    url = f"{upstream.url}/v2/library/other/blobs/{hub_image.layers[0].digest}"
    assert client.get(url).json()["errors"][0]["code"] == "BLOB_UNKNOWN"
    assert client.get(manifest_url(upstream, repo="library/none")).json()["errors"][0]["code"] == "NAME_UNKNOWN"
    upstream.set(auth="bearer", hide_unknown=True)
    refused = client.get(manifest_url(upstream, repo="library/none"))
    with_token = client.get(manifest_url(upstream, repo="library/none"), headers=bearer(token_for(client, refused)))
    assert with_token.status_code == 401


def test_large_content_needs_little_memory(tmp_path: Path) -> None:
    """The fake Hub sends a blob of 256 MiB with the right digest, and its memory grows by less than 50 MiB."""
    content = UpstreamContent()
    blob = content.add(REPO, noise_image("large", 256 * MIB), "1").layers[0]
    with hub(tmp_path, content) as upstream, ask_whole(upstream, blob.digest) as sock:
        before = peak_kib(upstream.pid)
        total, size = hashlib.sha256(), 0
        for piece in pieces(sock):
            total.update(piece)
            size += len(piece)
        assert size == blob.size
        assert "sha256:" + total.hexdigest() == blob.digest
        assert peak_kib(upstream.pid) - before < 50 << 10


def peak_kib(pid: int) -> int:
    """Returns the peak memory of the process in KiB (VmHWM in proc(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def ask_whole(upstream: Hub, digest: str) -> socket.socket:
    """Requests a blob, and reads the headers of the response. Returns the socket, from which the body can be read."""
    sock = ask(upstream, f"/v2/{REPO}/blobs/{digest}", "Connection: close")
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += sock.recv(1)
    assert head.startswith(b"HTTP/1.1 200 ")
    return sock


def pieces(sock: socket.socket) -> Iterator[bytes]:
    """Yields the bytes of the connection until it ends."""
    while piece := sock.recv(1 << 20):
        yield piece


def test_hub_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """The process of the fake Hub ends when the process that has started it is killed."""
    program = (
        "import sys, time; from pathlib import Path; from tests.fakes.hub.hub import hub\n"
        "with hub(Path(sys.argv[1])) as upstream:\n    print(upstream.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
    hub_process = os.pidfd_open(pid)
    try:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert select.select([hub_process], [], [], 30)[0]
    finally:
        os.close(hub_process)
