"""The stand-in does what it says: a stand-in that lies would make every test with it worthless."""

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
import pytest

from tests.fakes.client_images import DOCKER_LIST, MIB
from tests.fakes.hub.hub import Hub, HubFailed, hub, repeated, union
from tests.fakes.plain_client import plain_client
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

REPO = "library/app"
SIZE = 3 * MIB + 11


@pytest.fixture(scope="module")
def held() -> ImageTree:
    return noise_image("app", 1000, SIZE)


@pytest.fixture
def content(held: ImageTree) -> UpstreamContent:
    made = UpstreamContent()
    made.add(REPO, held, "1", "latest")
    return made


@pytest.fixture
def upstream(tmp_path: Path, content: UpstreamContent) -> Iterator[Hub]:
    with hub(tmp_path, content) as running:
        yield running


@pytest.fixture
def client() -> Iterator[httpx2.Client]:
    with plain_client(timeout=30, headers={"Accept-Encoding": "identity"}) as made:
        yield made


def blob_url(upstream: Hub, digest: str) -> str:
    return f"{upstream.url}/v2/{REPO}/blobs/{digest}"


def manifest_url(upstream: Hub, reference: str = "1", repo: str = REPO) -> str:
    return f"{upstream.url}/v2/{repo}/manifests/{reference}"


def ask(upstream: Hub, path: str, *lines: str) -> socket.socket:
    """Sends a GET by hand."""
    host, port = upstream.address.split(":")
    sock = socket.create_connection((host, int(port)), 30)
    sock.sendall("\r\n".join([f"GET {path} HTTP/1.1", "Host: hub", *lines, "", ""]).encode())
    return sock


def rest(sock: socket.socket) -> tuple[bytes, bool]:
    """All that still comes, and whether a reset ended it."""
    found = b""
    try:
        while piece := sock.recv(1 << 20):
            found += piece
    except ConnectionResetError:
        return found, True
    finally:
        sock.close()
    return found, False


def body_of(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


def token_for(client: httpx2.Client, refused: httpx2.Response, auth: tuple[str, str] | None = None) -> httpx2.Response:
    """Asks the token service that a 401 names, for what it names."""
    scheme, _, text = refused.headers["WWW-Authenticate"].partition(" ")
    assert scheme == "Bearer"
    challenge = {name: value.strip('"') for name, _, value in (part.partition("=") for part in text.split(","))}
    query = {"service": challenge["service"], "scope": challenge["scope"]}
    return client.get(challenge["realm"], params=query, auth=auth)


def bearer(answer: httpx2.Response) -> dict[str, str]:
    return {"Authorization": f"Bearer {answer.raise_for_status().json()['token']}"}


def test_manifests_by_tag_and_by_digest_are_byte_exact(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """GET and HEAD have the digest, the media type and the length; HEAD has no body, an unknown tag is a 404."""
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
    """Whole and by range, from files and from noise; what was sent is on record to the byte."""
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
    """Any piece of it is what the whole has at that place, beyond the period as well."""
    noise = Noise("n", 20 * MIB)
    whole = noise.read(0, noise.size)
    assert len(whole) == noise.size
    for start, stop in ((0, 1), (8388592, 8388595), (9 * MIB, 18 * MIB), (20 * MIB - 1, 20 * MIB)):
        assert noise.read(start, stop) == whole[start:stop]
    assert len({whole[start : start + 4096] for start in range(0, noise.size, MIB)}) == 20


def test_without_ranges_a_blob_comes_whole(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """Range is not looked at, and nothing says that it would be."""
    upstream.set(ranges=False)
    got = client.get(blob_url(upstream, held.layers[0].digest), headers={"Range": "bytes=5-9"})
    assert (got.status_code, len(got.content)) == (200, 1000)
    assert "Accept-Ranges" not in got.headers


def test_tokens_are_asked_for_and_end(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """401 with a challenge, then a token that is good for two requests, then `invalid_token`."""
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
    """A private repository wants the one login there is; a wrong one gets 401 from the token service, or by Basic."""
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
    """Blobs are redirected to it; with Authorization it answers 400, and a link may be good for a while only."""
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


def test_the_rate_limit_counts_gets(upstream: Hub, client: httpx2.Client) -> None:
    """HEADs are free; after two GETs there is 429 with Retry-After, until the limit is set anew."""
    upstream.set(limit=2, retry_after=7)
    assert client.head(manifest_url(upstream)).headers["ratelimit-remaining"] == "2;w=21600"
    answers = [client.get(manifest_url(upstream)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["ratelimit-remaining"] for answer in answers] == ["1;w=21600", "0;w=21600", "0;w=21600"]
    assert answers[0].headers["ratelimit-limit"] == "2;w=21600"
    assert answers[2].headers["Retry-After"] == "7"
    assert client.head(manifest_url(upstream)).status_code == 200
    upstream.set(limit=1)
    assert client.get(manifest_url(upstream)).status_code == 200


@pytest.mark.parametrize("reset", [False, True])
def test_a_drop_ends_the_connection_after_so_many_bytes(upstream: Hub, held: ImageTree, reset: bool) -> None:
    """All that was sent arrives, then comes the end, by FIN or by RST; the next request is well again."""
    layer = held.layers[1]
    upstream.fault(drop_after=1_000_001, reset=reset)
    rest(ask(upstream, f"/v2/{REPO}/blobs/{held.layers[0].digest}", "Connection: close"))  # too short for it
    answer, was_reset = rest(ask(upstream, f"/v2/{REPO}/blobs/{layer.digest}", "Range: bytes=9-"))
    assert was_reset is reset
    assert body_of(answer) == layer.read(9, 1_000_010)
    assert upstream.sent(layer.digest) == [(9, 1_000_010)]
    assert [seen.end for seen in upstream.requests("blob")] == ["whole", "dropped"]
    answer, was_reset = rest(
        ask(upstream, f"/v2/{REPO}/blobs/{layer.digest}", "Range: bytes=1000010-", "Connection: close")
    )
    assert body_of(answer) == layer.read(1_000_010)
    assert repeated(upstream.sent(layer.digest)) == []
    assert union(upstream.sent(layer.digest)) == [(9, SIZE)]


def test_a_wrong_byte_is_at_its_place(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """Only answers that have the byte are hit, and so many of them; manifests too."""
    layer = held.layers[1]
    upstream.fault(corrupt=2_000_000, times=2)
    url = blob_url(upstream, layer.digest)
    assert client.get(url, headers={"Range": "bytes=0-1999999"}).content == layer.read(0, 2_000_000)
    for asked, start in (("0-", 0), ("1999990-", 1_999_990)):
        got, right = client.get(url, headers={"Range": f"bytes={asked}"}).content, layer.read(start)
        assert [start + at for at, (a, b) in enumerate(zip(got, right, strict=True)) if a != b] == [2_000_000]
    assert client.get(url).content == layer.read()
    upstream.fault(on="manifest", corrupt=3, times=None)
    assert client.get(manifest_url(upstream)).content[3] == held.body[3] ^ 0xFF
    upstream.clear()
    assert client.get(manifest_url(upstream)).content == held.body


def test_statuses_and_hangups(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """The next requests of a kind get a status, or no answer; `skip` lets some off, and others never notice."""
    upstream.fault(on="manifest", method="", status=503, times=2, skip=1, retry_after="3")
    answers = [client.head(manifest_url(upstream)) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 503, 503, 200]
    assert answers[1].headers["Retry-After"] == "3"
    assert upstream.faults == 0
    upstream.fault(on="blob", match=held.layers[0].digest, hangup=True)
    assert client.get(blob_url(upstream, held.layers[1].digest)).status_code == 200
    with pytest.raises(httpx2.RemoteProtocolError):
        client.get(blob_url(upstream, held.layers[0].digest))
    assert client.get(blob_url(upstream, held.layers[0].digest)).status_code == 200


def test_stalls_hold_until_they_are_released(upstream: Hub, held: ImageTree) -> None:
    """Before the headers and in the middle of the body; a client that leaves meanwhile is noticed."""
    layer = held.layers[1]
    path = f"/v2/{REPO}/blobs/{layer.digest}"
    upstream.fault(stall=True, times=2)
    left, held_up = ask(upstream, path, "Connection: close"), ask(upstream, path, "Connection: close")
    upstream.wait(2, "blob")
    left.close()
    upstream.until(lambda: upstream.open == 1)
    held_up.settimeout(0.1)
    with pytest.raises(TimeoutError):
        held_up.recv(1)
    held_up.settimeout(30)
    upstream.release()
    assert body_of(rest(held_up)[0]) == layer.read()
    assert sorted(seen.end for seen in upstream.requests("blob")) == ["gone", "whole"]
    upstream.forget()
    upstream.fault(stall_after=70_000)
    sock = ask(upstream, path, "Connection: close")
    upstream.until(lambda: upstream.sent(layer.digest) == [(0, 70_000)])
    upstream.release()
    assert body_of(rest(sock)[0]) == layer.read()


def test_connections_are_refused_and_taken_again(upstream: Hub, client: httpx2.Client) -> None:
    """On the same port; what was open is reset, unless it is to be left."""
    assert client.get(manifest_url(upstream)).status_code == 200
    upstream.refuse(cut=False)
    assert client.get(manifest_url(upstream)).status_code == 200
    upstream.cut()
    with pytest.raises(httpx2.TransportError):
        client.get(manifest_url(upstream))
    with pytest.raises(httpx2.ConnectError):
        client.get(manifest_url(upstream))
    upstream.listen()
    assert client.get(manifest_url(upstream)).status_code == 200
    assert (upstream.open, upstream.opened) == (1, 2)


def test_the_rate_is_kept_per_connection(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """A connection gets no more than its rate, smoothly: the answer's record says when it began and ended."""
    upstream.set(rate=8 * MIB)
    digest = held.layers[1].digest
    client.get(blob_url(upstream, digest), headers={"Range": f"bytes=0-{2 * MIB - 1}"})
    [seen] = upstream.requests("blob")
    assert seen.ended - seen.first_byte >= 0.2
    # A burst may hold what three slices of 10 ms carry.
    assert seen.sent / (seen.ended - seen.first_byte + 0.04) < 8.5 * MIB


def test_latency_comes_before_each_answer(upstream: Hub, client: httpx2.Client) -> None:
    """No answer's first byte leaves sooner."""
    upstream.set(latency=0.05)
    client.get(manifest_url(upstream))
    [seen] = upstream.requests()
    assert seen.first_byte - seen.begun >= 0.05


def test_whoever_accepts_gzip_gets_it(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """Only then, for blobs and manifests."""
    upstream.set(gzip=True)
    url = blob_url(upstream, held.layers[0].digest)
    assert client.get(url).content == held.layers[0].read()
    packed = client.get(url, headers={"Accept-Encoding": "zstd, gzip;q=0.5"})
    assert packed.headers["Content-Encoding"] == "gzip"
    assert packed.content == held.layers[0].read()


def test_who_does_not_accept_a_media_type_gets_no_manifest(
    upstream: Hub, client: httpx2.Client, held: ImageTree
) -> None:
    """With the switch `negotiates`: a client that forgets Accept is found out."""
    upstream.set(negotiates=True)
    assert client.get(manifest_url(upstream)).status_code == 404
    assert client.get(manifest_url(upstream), headers={"Accept": f"x/y, {held.media_type}"}).content == held.body
    several = [("Accept", "x/y"), ("Accept", held.media_type), ("Accept", "y/z")]
    assert client.get(manifest_url(upstream), headers=several).content == held.body


def test_answers_without_a_length(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """They end with their connection; one that is dropped looks like a whole one."""
    upstream.set(lengths=False)
    layer = held.layers[1]
    got = client.get(blob_url(upstream, layer.digest), headers={"Range": "bytes=7-"})
    assert got.content == layer.read(7)
    assert "Content-Length" not in got.headers
    assert "Content-Length" not in client.head(manifest_url(upstream)).headers
    upstream.fault(drop_after=99)
    assert client.get(blob_url(upstream, layer.digest)).content == layer.read(0, 99)


def test_a_range_may_begin_elsewhere(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """It says so in Content-Range, and the record has what was sent."""
    layer = held.layers[1]
    upstream.fault(shift=10)
    got = client.get(blob_url(upstream, layer.digest), headers={"Range": "bytes=7-99"})
    assert got.headers["Content-Range"] == f"bytes 17-99/{SIZE}"
    assert got.content == layer.read(17, 100)
    assert upstream.sent(layer.digest) == [(17, 100)]


def test_tags_come_in_pages(upstream: Hub, client: httpx2.Client, held: ImageTree) -> None:
    """In order, after `last`, no more than `n` or the switch `page`, with a Link while there are more."""
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
    """Descriptors with artifactType and annotations, filtered when asked; switched off it is a 404."""
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
    """The list, its children and their blobs are all there, as docker's media types have it."""
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
    """404 for a repository, and for a blob that only another one has; 401 as on Hub where that is switched on."""
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
    """256 MiB are sent in less memory than a fifth of them, and they have the digest that the test knows."""
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
    """The most memory that the process has had (proc(5), VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def ask_whole(upstream: Hub, digest: str) -> socket.socket:
    """A connection that has read the headers of a blob's answer."""
    sock = ask(upstream, f"/v2/{REPO}/blobs/{digest}", "Connection: close")
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += sock.recv(1)
    assert head.startswith(b"HTTP/1.1 200 ")
    return sock


def pieces(sock: socket.socket) -> Iterator[bytes]:
    while piece := sock.recv(1 << 20):
        yield piece


def test_a_mistake_in_a_test_is_told(upstream: Hub) -> None:
    """A switch or a fault that does not exist is an error, where it is asked for."""
    with pytest.raises(HubFailed, match="no switch ratte"):
        upstream.set(ratte=1)
    with pytest.raises(TypeError, match="dorp"):
        upstream.fault(dorp=1)


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Killed tests leave nothing behind."""
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
