"""The fake Hub serves content as a registry does. If it were wrong, the tests that use it would be worthless."""

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

from tests.fakes.client_images import DOCKER_LIST, MIB
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.server_process import ROOT
from tests.fakes.upstream_content import (
    ImageTree,
    Noise,
    UpstreamContent,
    fallback_index,
    fallback_tag,
    index_of,
    noise_image,
    ubuntu,
)
from tests.system.fakes.conftest import REPO, SIZE, ask, bearer, blob_url, manifest_url, token_for


def test_manifests_by_tag_and_by_digest_are_byte_exact(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """GET and HEAD have the digest, the media type and the length. HEAD has no body. An unknown tag gets 404."""
    for reference in ("1", held.digest):
        got = client.get(manifest_url(upstream, reference))
        head = client.head(manifest_url(upstream, reference))
        assert got.content == held.body
        for answer in (got, head):
            assert answer.headers["Docker-Content-Digest"] == held.digest
            assert answer.headers["Content-Type"] == held.media_type
            assert answer.headers["Content-Length"] == str(len(held.body))
        assert head.content == b""
    missing = client.get(manifest_url(upstream, "none"))
    assert (missing.status_code, missing.json()["errors"][0]["code"]) == (404, "MANIFEST_UNKNOWN")
    assert upstream.count("manifest", "GET") == 3
    assert upstream.count("manifest", "HEAD", digest=held.digest) == 2


def test_a_blob_has_the_bytes_its_digest_promises(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """Blobs from files and from noise have the right bytes, whole and by range. The record has the exact sent bytes."""
    for blob in (held.config, *held.layers):
        whole = client.get(blob_url(upstream, blob.digest)).content
        assert "sha256:" + hashlib.sha256(whole).hexdigest() == blob.digest
        assert whole == blob.read()
        assert upstream.sent(blob.digest) == [(0, blob.size)]
    digest = held.layers[1].digest
    for asked, start, stop in (
        ("5-", 5, SIZE),
        ("7-1500000", 7, 1500001),
        ("-9", SIZE - 9, SIZE),
        ("1-9999999", 1, SIZE),
    ):
        part = client.get(blob_url(upstream, digest), headers={"Range": f"bytes={asked}"})
        assert part.status_code == 206
        assert part.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{SIZE}"
        assert part.content == whole[start:stop]
        assert upstream.sent(digest)[-1] == (start, stop)
    beyond = client.get(blob_url(upstream, digest), headers={"Range": f"bytes={SIZE}-"})
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{SIZE}")
    assert [seen.range for seen in upstream.requests("blob", digest=digest)][1] == "bytes=5-"


def test_noise_is_the_same_wherever_it_is_read() -> None:
    """Any piece of noise equals the same part of the whole, also beyond the period."""
    noise = Noise("n", 20 * MIB)
    whole = noise.read(0, noise.size)
    assert len(whole) == noise.size
    for start, stop in ((0, 1), (8388592, 8388595), (9 * MIB, 18 * MIB), (20 * MIB - 1, 20 * MIB)):
        assert noise.read(start, stop) == whole[start:stop]
    assert len({whole[start : start + 4096] for start in range(0, noise.size, MIB)}) == 20


def test_without_ranges_a_blob_comes_whole(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """Without `ranges`, Range is ignored, and no header says that ranges are supported."""
    upstream.set(ranges=False)
    got = client.get(blob_url(upstream, held.layers[0].digest), headers={"Range": "bytes=5-9"})
    assert (got.status_code, len(got.content)) == (200, 1000)
    assert "Accept-Ranges" not in got.headers


def test_tokens_are_asked_for_and_end(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """The first request gets a 401 with a challenge. A token is then accepted for two requests, and after that refused
    with `invalid_token`."""
    upstream.set(auth="bearer", token_uses=2, realm=f"{upstream.auth_url}/token")
    refused = client.get(manifest_url(upstream))
    assert refused.status_code == 401
    assert urlsplit(upstream.auth_url).hostname != urlsplit(upstream.url).hostname
    given = token_for(client, refused)
    assert given.json()["expires_in"] == 300
    answers = [client.get(manifest_url(upstream), headers=bearer(given)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 401]
    assert 'error="invalid_token"' in answers[2].headers["WWW-Authenticate"]
    assert upstream.count("token") == 1
    assert [seen.authorization for seen in upstream.requests("manifest")] == [False, True, True, True]
    fresh = bearer(token_for(client, refused))
    upstream.set(token_seconds=0)
    late = bearer(token_for(client, refused))
    assert client.head(manifest_url(upstream), headers=fresh).status_code == 200
    assert client.head(manifest_url(upstream), headers=late).status_code == 401
    upstream.revoke()
    assert client.head(manifest_url(upstream), headers=fresh).status_code == 401


def test_logins(upstream: Hub, client: httpx2.Client) -> None:
    """A private repository needs the only login. A wrong login gets 401, from the token service or by Basic
    authentication."""
    upstream.set(auth="bearer", username="ann", password="right", private=(REPO,))
    refused = client.get(manifest_url(upstream))
    anonymous = client.get(manifest_url(upstream), headers=bearer(token_for(client, refused)))
    assert anonymous.status_code == 401
    assert 'error="insufficient_scope"' in anonymous.headers["WWW-Authenticate"]
    assert token_for(client, refused, ("ann", "wrong")).status_code == 401
    known = bearer(token_for(client, refused, ("ann", "right")))
    assert client.get(manifest_url(upstream), headers=known).status_code == 200
    other = client.get(manifest_url(upstream, repo="library/other"), headers=known)
    assert other.status_code == 401
    upstream.set(auth="basic")
    assert client.get(manifest_url(upstream), auth=("ann", "wrong")).status_code == 401
    assert client.get(manifest_url(upstream), auth=("ann", "right")).status_code == 200


def test_the_second_port_refuses_authorization(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """Blobs are redirected to the second port. It answers 400 to requests with Authorization. The number of uses of a
    link can be limited."""
    digest = held.layers[1].digest
    upstream.set(redirects=True, link_uses=1)
    moved = client.get(blob_url(upstream, digest))
    assert moved.status_code == 307
    link = moved.headers["Location"]
    assert link.startswith(upstream.cdn_url)
    assert client.get(link, headers={"Authorization": "Bearer x"}).status_code == 400
    part = client.get(link, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, held.layers[1].read(10, 20))
    assert client.get(link).status_code == 403
    assert [seen.kind for seen in upstream.requests(digest=digest)] == ["redirect", "blob", "blob", "blob"]
    assert upstream.sent(digest) == [(10, 20)]


def test_whoever_accepts_gzip_gets_it(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """Only clients that accept gzip get compressed blobs and manifests."""
    upstream.set(gzip=True)
    url = blob_url(upstream, held.layers[0].digest)
    assert client.get(url).content == held.layers[0].read()
    packed = client.get(url, headers={"Accept-Encoding": "zstd, gzip;q=0.5"})
    assert packed.headers["Content-Encoding"] == "gzip"
    assert packed.content == held.layers[0].read()


def test_who_does_not_accept_a_media_type_gets_no_manifest(
    upstream: Hub, client: httpx2.Client, held: ImageTree
) -> None:
    """With the switch `negotiates`, a client that does not send Accept gets no manifest."""
    upstream.set(negotiates=True)
    assert client.get(manifest_url(upstream)).status_code == 404
    assert client.get(manifest_url(upstream), headers={"Accept": f"x/y, {held.media_type}"}).content == held.body
    several = [("Accept", "x/y"), ("Accept", held.media_type), ("Accept", "y/z")]
    assert client.get(manifest_url(upstream), headers=several).content == held.body


def test_tags_come_in_pages(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """A page has tags in order, after `last`, at most `n` or the switch `page`, with a Link if there are more."""
    for tag in ("3", "2"):
        upstream.tag(REPO, tag, held.digest)
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
    upstream.remove(REPO, held.digest)
    assert client.get(url).json()["tags"] == []


def test_referrers_by_the_api_or_by_the_fallback_tag(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """Referrers have artifactType and annotations, and can be filtered. If the API is switched off, it answers 404."""
    signature = noise_image("signature", 10, subject=held, annotations={"by": "ann"})
    more = UpstreamContent()
    more.add(REPO, signature)
    more.add(REPO, fallback_index(signature), fallback_tag(held.digest))
    upstream.put(more)
    url = f"{upstream.url}/v2/{REPO}/referrers/{held.digest}"
    listed = client.get(url)
    assert listed.headers["Content-Type"] == "application/vnd.oci.image.index.v1+json"
    [entry] = listed.json()["manifests"]
    assert (entry["digest"], entry["annotations"]) == (signature.digest, {"by": "ann"})
    none = client.get(url, params={"artifactType": "application/none"})
    assert (none.json()["manifests"], none.headers["OCI-Filters-Applied"]) == ([], "artifactType")
    upstream.set(referrers=False)
    assert client.get(url).status_code == 404
    fallback = client.get(manifest_url(upstream, fallback_tag(held.digest)))
    assert fallback.json()["manifests"] == [entry]


def test_an_image_of_several_platforms(upstream: Hub, client: httpx2.Client) -> None:
    """The list, its children and their blobs can be pulled, with docker's media types."""
    made = UpstreamContent()
    listed = made.add("library/ubuntu", ubuntu(), "18.04")
    upstream.put(made)
    answer = client.get(manifest_url(upstream, "18.04", "library/ubuntu"))
    assert answer.headers["Content-Type"] == DOCKER_LIST
    for entry in answer.json()["manifests"]:
        child = client.get(manifest_url(upstream, entry["digest"], "library/ubuntu"))
        for blob in (child.json()["config"], *child.json()["layers"]):
            got = client.get(f"{upstream.url}/v2/library/ubuntu/blobs/{blob['digest']}").content
            assert len(got) == blob["size"]
            assert "sha256:" + hashlib.sha256(got).hexdigest() == blob["digest"]
    assert index_of((listed.children[0], "amd64")).children[0].layers == listed.children[0].layers


def test_unknown_content(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """An unknown repository gets 404, and so does a blob that only another repository has. With the switch
    `hide_unknown`, it is 401, as at Docker Hub."""
    other = UpstreamContent()
    other.add("library/other", noise_image("other", 10), "1")
    upstream.put(other)
    url = f"{upstream.url}/v2/library/other/blobs/{held.layers[0].digest}"
    assert client.get(url).json()["errors"][0]["code"] == "BLOB_UNKNOWN"
    assert client.get(manifest_url(upstream, repo="library/none")).json()["errors"][0]["code"] == "NAME_UNKNOWN"
    upstream.set(auth="bearer", hide_unknown=True)
    refused = client.get(manifest_url(upstream, repo="library/none"))
    again = client.get(manifest_url(upstream, repo="library/none"), headers=bearer(token_for(client, refused)))
    assert again.status_code == 401


def test_large_content_costs_no_memory(tmp_path: Path) -> None:
    """256 MiB are sent with less memory than a fifth of that, and have the expected digest."""
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
    """Returns the largest memory of the process so far (proc(5), VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def ask_whole(upstream: Hub, digest: str) -> socket.socket:
    """Opens a connection that has read the headers of a response with a blob."""
    sock = ask(upstream, f"/v2/{REPO}/blobs/{digest}", "Connection: close")
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += sock.recv(1)
    assert head.startswith(b"HTTP/1.1 200 ")
    return sock


def pieces(sock: socket.socket) -> Iterator[bytes]:
    while piece := sock.recv(1 << 20):
        yield piece


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """The process ends when the test that started it is killed."""
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
    ended = os.pidfd_open(pid)
    try:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert select.select([ended], [], [], 30)[0]
    finally:
        os.close(ended)
