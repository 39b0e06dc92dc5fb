"""The whole service in front of an upstream: real processes on both sides, and plain HTTP between client and server."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx2
import pytest

from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import Hub, hub, union
from tests.fakes.plain_client import plain_client
from tests.fakes.server_process import RegistryServer, running_server
from tests.fakes.upstream_content import ImageTree, UpstreamContent, noise_image

SIZE = 3 * MIB
TIMEOUT = 60.0


class HubAndServer:
    """A server with docker.io as its default upstream, the fake Hub behind it, and an HTTP client."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        content = UpstreamContent()
        self.image: ImageTree = content.add("library/app", noise_image("app", 1000, SIZE), "1", "latest")
        self.theirs = content.add("team/app", noise_image("theirs", 1000), "1")
        self.hub: Hub = stack.enter_context(hub(folder, content, auth="bearer", redirects=True, send_buffer=65536))
        self.server: RegistryServer
        self.http: httpx2.Client

    def serve(self, *args: str, upstream: str = "", more: str = "") -> HubAndServer:
        """Starts the server. `upstream`: settings of the upstream; `more`: further settings before it."""
        (self.folder / "entrepot.toml").write_text(
            f'{more}\n[[upstream]]\nname = "docker.io"\ndefault = true\nendpoints = ["{self.hub.url}"]\n{upstream}\n'
        )
        config = str(self.folder / "entrepot.toml")
        self.server = self._stack.enter_context(running_server(self.folder, "--config", config, *args))
        self.http = self._stack.enter_context(plain_client(self.server.url, timeout=TIMEOUT))
        return self

    @property
    def layer(self) -> str:
        return self.image.layers[1].digest

    @property
    def encoded(self) -> str:
        """The layer's hash, as in the path that the fake Hub redirects to."""
        return self.layer.partition(":")[2]

    @property
    def content(self) -> bytes:
        """The bytes of the layer."""
        return self.image.layers[1].read()

    def push(self, repo: str, tag: str) -> tuple[int, bytes]:
        """Pushes an image without layers. Returns the last status and the manifest."""
        config = b"{}"
        digest = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
        answer = self.http.post(f"/v2/{repo}/blobs/uploads/", params={"digest": digest}, content=config)
        body = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": {"mediaType": "application/x.test", "digest": digest, "size": len(config)},
                "layers": [],
            }
        ).encode()
        if answer.status_code == 201:
            kind = {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}
            answer = self.http.put(f"/v2/{repo}/manifests/{tag}", content=body, headers=kind)
        return answer.status_code, body


@pytest.fixture
def site(tmp_path: Path) -> Iterator[HubAndServer]:
    with ExitStack() as stack:
        yield HubAndServer(tmp_path, stack)


FORMS = [
    "/v2/app/manifests/1",
    "/v2/library/app/manifests/1",
    "/v2/docker.io/app/manifests/1",
    "/v2/docker.io/library/app/manifests/1",
    "/v2/library/app/manifests/1?ns=docker.io",
    "/v2/app/manifests/1?ns=docker.io",
]


def test_one_image_by_all_its_names(site: HubAndServer) -> None:
    """Every form of the name returns the same manifest from one upstream request; it is stored once."""
    site.serve()
    for path in FORMS:
        answer = site.http.get(path)
        assert (answer.status_code, answer.content) == (200, site.image.body)
        assert answer.headers.get("oci-namespace") == ("docker.io" if "ns=" in path else None)
        assert site.http.head(path).headers["docker-content-digest"] == site.image.digest
    assert site.hub.count("manifest", "GET", site.image.digest) == 1
    assert site.http.get("/v2/_catalog").json() == {"repositories": ["docker.io/library/app"]}


def test_a_look_asks_no_upstream_and_a_download_does(site: HubAndServer) -> None:
    """Content that is not cached is unknown to requests that only look, and they send nothing upstream. A download
    fetches it; from then on it is listed under each of its names."""
    site.serve()
    paths = [f"/api/v1/repositories/{name}" for name in ("app", "library/app", "docker.io/library/app")]
    for path in paths:
        for route in ("tag-list", "manifests/1/details", "manifests/1/referrers"):
            assert site.http.get(f"{path}/{route}").status_code == 404
    assert site.hub.count("manifest", "GET", site.image.digest) == site.hub.count("manifest", "GET", "1") == 0
    archive = site.http.get(f"{paths[0]}/manifests/1/archive")
    assert (archive.status_code, len(archive.content)) == (200, int(archive.headers["content-length"]))
    assert site.content in archive.content
    for path in paths:
        [row] = site.http.get(f"{path}/tag-list").json()["items"]
        assert (row["tag"], row["digest"]) == ("1", site.image.digest)
        [step, _] = site.http.get(f"{path}/manifests/1/details").json()["image"]["steps"]
        assert step["layer"]["present"]


def test_hosting_beside_it(site: HubAndServer) -> None:
    """A name without a push belongs to the upstream; after its first push it is hosted, on every worker, also after
    deletion."""
    site.serve()
    assert site.http.get("/v2/team/app/manifests/1").content == site.theirs.body
    status, ours = site.push("team/app", "1")
    assert status == 201
    for _ in range(8):  # both workers
        with closing(http.client.HTTPConnection(site.server.address, timeout=TIMEOUT)) as connection:
            connection.request("GET", "/v2/team/app/manifests/1")
            assert connection.getresponse().read() == ours
    assert site.http.get("/v2/team/app/manifests/1?ns=docker.io").content == site.theirs.body
    assert site.http.delete("/v2/team/app/manifests/1").status_code == 202
    site.hub.forget()
    assert site.http.get("/v2/team/app/manifests/1").status_code == 404
    assert site.http.get(f"/v2/team/app/manifests/{site.theirs.digest}").status_code == 404
    assert site.hub.count("manifest") == 0


def test_hosted_prefixes_are_never_asked_for(site: HubAndServer) -> None:
    """The upstream is not asked for hosted names: neither for manifests nor for the blobs a push looks for."""
    site.serve(more='[hosted]\nprefixes = ["team/**"]')
    assert site.http.get("/v2/team/app/manifests/1").status_code == 404
    assert site.http.head(f"/v2/team/app/blobs/{site.theirs.config.digest}").status_code == 404
    assert site.push("team/app", "1")[0] == 201
    assert site.hub.requests() == []


@pytest.mark.parametrize("repo", ["library/app", "docker.io/app", "docker.io/team/app"])
def test_pushes_to_mirrored_names(site: HubAndServer, repo: str) -> None:
    """Pushes to mirrored names get 403 DENIED, with what to do instead."""
    site.serve()
    answer = site.http.post(f"/v2/{repo}/blobs/uploads/")
    assert answer.status_code == 403
    (error,) = answer.json()["errors"]
    assert error["code"] == "DENIED"
    assert "push under a name of your own" in error["message"]


def test_a_push_of_what_the_upstream_has(site: HubAndServer) -> None:
    """Blobs that the client was told exist under a pulled name need no upload, stored or not; the hosted image is
    complete."""
    site.serve(upstream='prefetch = "off"')
    repo = "/v2/team/app"
    site.http.get(f"{repo}/manifests/1")
    for blob in site.theirs.blobs:
        assert site.http.head(f"{repo}/blobs/{blob}").status_code == 200
    kind = {"Content-Type": site.theirs.media_type}
    assert site.http.put(f"{repo}/manifests/mine", content=site.theirs.body, headers=kind).status_code == 201
    site.hub.refuse()
    for digest, held in site.theirs.blobs.items():
        assert site.http.get(f"{repo}/blobs/{digest}").content == held.read()
    assert site.http.get(f"{repo}/tags/list").json()["tags"] == ["mine"]


def test_mount_from_a_mirrored_name(site: HubAndServer) -> None:
    """Stored blobs are mounted; for others the mount becomes an upload."""
    site.serve(upstream='prefetch = "off"')
    config, layer = site.image.config.digest, site.image.layers[0].digest
    site.http.get("/v2/app/manifests/1")
    assert site.http.get(f"/v2/app/blobs/{config}").status_code == 200
    mount = {"mount": config, "from": "library/app"}
    assert site.http.post("/v2/mine/app/blobs/uploads/", params=mount).status_code == 201
    assert site.http.post("/v2/mine/app/blobs/uploads/", params={**mount, "mount": layer}).status_code == 202


def test_a_cold_blob_leaves_as_it_comes(site: HubAndServer) -> None:
    """Status and first bytes are sent while the upstream holds back the rest; the rest follows, unchanged."""
    site.serve(upstream='prefetch = "off"\nconnections = 1')
    site.http.get("/v2/app/manifests/1")
    site.hub.fault(on="blob", match=site.encoded, stall_after=MIB)
    with closing(http.client.HTTPConnection(site.server.address, timeout=TIMEOUT)) as connection:
        connection.request("GET", f"/v2/app/blobs/{site.layer}")
        answer = connection.getresponse()
        assert (answer.status, answer.headers["content-length"]) == (200, str(SIZE))
        first = answer.read(MIB // 2)
        site.hub.release()
        assert first + answer.read() == site.content
    assert union(site.hub.sent(site.layer)) == [(0, SIZE)]


def test_ranges_of_a_cold_blob(site: HubAndServer) -> None:
    """A single range and several ranges are served before and after the blob is stored."""
    site.serve(upstream='prefetch = "off"')
    site.http.get("/v2/app/manifests/1")
    path = f"/v2/app/blobs/{site.layer}"
    for _ in range(2):
        answer = site.http.get(path, headers={"Range": f"bytes={SIZE - 1000}-"})
        assert (answer.status_code, answer.content) == (206, site.content[-1000:])
        answer = site.http.get(path, headers={"Range": "bytes=100-199,2000000-2000999"})
        assert answer.status_code == 206
        assert site.content[100:200] in answer.content
        assert site.content[2000000:2001000] in answer.content
    assert site.http.get(path).content == site.content
    answer = site.http.get(path, headers={"Range": f"bytes={SIZE}-"})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{SIZE}")


def test_a_blob_with_wrong_bytes_is_never_whole(site: HubAndServer) -> None:
    """The connection is cut before the last byte; the next request can succeed."""
    site.serve(upstream='prefetch = "off"')
    site.http.get("/v2/app/manifests/1")
    site.hub.fault(on="blob", match=site.encoded, corrupt=SIZE // 2, times=None)
    with pytest.raises(httpx2.TransportError):
        site.http.get(f"/v2/app/blobs/{site.layer}")
    site.hub.clear()
    assert site.http.get(f"/v2/app/blobs/{site.layer}").content == site.content


def test_a_stale_tag_is_said_to_be_stale(site: HubAndServer) -> None:
    """While the upstream is down, a cached tag is served with a Warning; a digest needs none."""
    site.serve(upstream='tag_ttl = "0s"')
    fresh = site.http.get("/v2/app/manifests/1")
    assert "warning" not in fresh.headers
    site.hub.refuse()
    for method in ("GET", "HEAD"):
        answer = site.http.request(method, "/v2/app/manifests/1")
        assert (answer.status_code, answer.headers["docker-content-digest"]) == (200, site.image.digest)
        assert answer.headers["warning"].startswith('299 - "')
    assert "warning" not in site.http.get(f"/v2/app/manifests/{site.image.digest}").headers


def test_what_cannot_be_had(site: HubAndServer) -> None:
    """Unknown content is 404; while the upstream is down, content that is not cached is 502."""
    site.serve(upstream='miss_ttl = "0s"')
    answer = site.http.get("/v2/app/manifests/none")
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (404, "MANIFEST_UNKNOWN")
    answer = site.http.get(f"/v2/app/blobs/sha256:{'0' * 64}")
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (404, "BLOB_UNKNOWN")
    site.hub.refuse()
    answer = site.http.get("/v2/app/manifests/2")
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (502, "UNAVAILABLE")


def test_an_upstream_that_says_nothing(site: HubAndServer) -> None:
    """Clients of a silent upstream soon get 504."""
    site.serve(upstream='idle_timeout = "300ms"')
    site.hub.fault(on="any", method="", stall=True, times=None)
    answer = site.http.get("/v2/app/manifests/1")
    assert answer.status_code == 504


def test_an_upstream_that_limits_us(site: HubAndServer) -> None:
    """A 429 of the upstream is passed on with its Retry-After if there is no cached copy."""
    site.serve()
    site.hub.set(limit=0, retry_after=7)
    answer = site.http.get("/v2/app/manifests/1")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")


def test_a_read_only_server_goes_on_mirroring(site: HubAndServer) -> None:
    """On a read-only server clients can change nothing, and what they pull is still fetched and stored."""
    site.serve("--read-only")
    assert site.http.get("/v2/app/manifests/1").content == site.image.body
    assert site.http.get(f"/v2/app/blobs/{site.layer}").content == site.content
    assert site.push("team/app", "1")[0] == 405
    assert site.http.delete("/v2/app/manifests/1").status_code == 405
    site.hub.refuse()
    assert site.http.get(f"/v2/app/blobs/{site.layer}").content == site.content


def test_delete_drops_the_cached_copy(site: HubAndServer) -> None:
    """After a delete the upstream is asked again."""
    site.serve()
    site.http.get("/v2/app/manifests/1")
    assert site.http.delete(f"/v2/app/manifests/{site.image.digest}").status_code == 202
    before = site.hub.count("manifest", "GET", site.image.digest)
    assert site.http.get("/v2/app/manifests/1").content == site.image.body
    assert site.hub.count("manifest", "GET", site.image.digest) == before + 1


def test_lists_of_an_upstream(site: HubAndServer) -> None:
    """The upstream's tags are listed page by page under the requested name."""
    site.serve()
    answer = site.http.get("/v2/app/tags/list?n=1")
    assert answer.json() == {"name": "app", "tags": ["1"]}
    answer = site.http.get(answer.headers["link"].partition(">")[0].removeprefix("<"))
    assert answer.json() == {"name": "app", "tags": ["latest"]}
    assert site.http.get(f"/v2/app/referrers/{site.image.digest}").json()["manifests"] == []


def test_stray_credentials_of_clients_do_no_harm(site: HubAndServer) -> None:
    """docker sends its login for Docker Hub to a mirror. The mirror neither requires nor forwards it."""
    site.serve()
    answer = site.http.get("/v2/app/manifests/1", headers={"Authorization": "Basic c3RyYXk6bG9naW4="})
    assert answer.status_code == 200
    assert "c3RyYXk6bG9naW4" not in site.server.log_text()


def test_an_upstream_is_not_contacted_at_the_start(site: HubAndServer) -> None:
    """The upstream may be down at the start: hosted images can be pushed and pulled."""
    site.hub.refuse()
    site.serve()
    assert site.http.head(f"/v2/mine/app/blobs/{site.layer}").status_code == 404
    status, ours = site.push("mine/app", "1")
    assert (status, site.http.get("/v2/mine/app/manifests/1").content) == (201, ours)
