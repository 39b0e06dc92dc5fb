"""Tests of the whole server as a mirror of a fake Docker Hub. The server and the fake Hub run in processes of their
own, and the tests are HTTP clients of the server."""

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
"""The number of seconds after which a request of a test fails."""


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


PATHS_OF_ONE_IMAGE = [
    "/v2/app/manifests/1",
    "/v2/library/app/manifests/1",
    "/v2/docker.io/app/manifests/1",
    "/v2/docker.io/library/app/manifests/1",
    "/v2/library/app/manifests/1?ns=docker.io",
    "/v2/app/manifests/1?ns=docker.io",
]


def test_all_names_of_an_image_return_the_same_manifest(site: HubAndServer) -> None:
    """Every form of an image's name returns the same manifest. The mirror requests it from the upstream once, and
    stores it under one name."""
    site.serve()
    for path in PATHS_OF_ONE_IMAGE:
        answer = site.http.get(path)
        assert (answer.status_code, answer.content) == (200, site.image.body)
        assert answer.headers.get("oci-namespace") == ("docker.io" if "ns=" in path else None)
        assert site.http.head(path).headers["docker-content-digest"] == site.image.digest
    assert site.hub.count("manifest", "GET", site.image.digest) == 1
    assert site.http.get("/v2/_catalog").json() == {"repositories": ["docker.io/library/app"]}


def test_api_lookups_send_no_upstream_request(site: HubAndServer) -> None:
    """For content that is not cached, the lookup routes of the API answer 404 and send no request to the upstream. The
    archive download fetches the image. From then on, the API lists the image under each of its names."""
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


def test_pushed_repository_replaces_the_mirrored_one(site: HubAndServer) -> None:
    """A name that nobody has pushed to is mirrored from the upstream. After the first push, all workers serve the
    pushed repository under this name. The name stays hosted when its tag is deleted."""
    site.serve()
    assert site.http.get("/v2/team/app/manifests/1").content == site.theirs.body
    status, pushed_body = site.push("team/app", "1")
    assert status == 201
    for _ in range(8):  # new connections, so that both workers get requests
        with closing(http.client.HTTPConnection(site.server.address, timeout=TIMEOUT)) as connection:
            connection.request("GET", "/v2/team/app/manifests/1")
            assert connection.getresponse().read() == pushed_body
    assert site.http.get("/v2/team/app/manifests/1?ns=docker.io").content == site.theirs.body
    assert site.http.delete("/v2/team/app/manifests/1").status_code == 202
    site.hub.forget()
    assert site.http.get("/v2/team/app/manifests/1").status_code == 404
    assert site.http.get(f"/v2/team/app/manifests/{site.theirs.digest}").status_code == 404
    assert site.hub.count("manifest") == 0


def test_hosted_prefixes_send_no_upstream_request(site: HubAndServer) -> None:
    """For names that match `hosted.prefixes`, the server sends no request to the upstream: neither for manifests nor
    for the blobs that a pushing client looks up."""
    site.serve(more='[hosted]\nprefixes = ["team/**"]')
    assert site.http.get("/v2/team/app/manifests/1").status_code == 404
    assert site.http.head(f"/v2/team/app/blobs/{site.theirs.config.digest}").status_code == 404
    assert site.push("team/app", "1")[0] == 201
    assert site.hub.requests() == []


@pytest.mark.parametrize("repo", ["library/app", "docker.io/app", "docker.io/team/app"])
def test_pushes_to_mirrored_names_are_denied(site: HubAndServer, repo: str) -> None:
    """A push to a mirrored name gets 403 DENIED, and the error message tells the client to push under another name."""
    site.serve()
    answer = site.http.post(f"/v2/{repo}/blobs/uploads/")
    assert answer.status_code == 403
    (error,) = answer.json()["errors"]
    assert error["code"] == "DENIED"
    assert "push under a name of your own" in error["message"]


def test_push_needs_no_upload_of_blobs_at_the_upstream(site: HubAndServer) -> None:
    """A client pulls a manifest, and HEAD requests tell it that the blobs exist under this name. It can then push the
    manifest under the same name without an upload, although the mirror has not stored the blobs yet. Afterwards the
    pushed image is complete without the upstream."""
    site.serve(upstream='prefetch = "off"')
    repo = "/v2/team/app"
    site.http.get(f"{repo}/manifests/1")
    for blob in site.theirs.blobs:
        assert site.http.head(f"{repo}/blobs/{blob}").status_code == 200
    kind = {"Content-Type": site.theirs.media_type}
    assert site.http.put(f"{repo}/manifests/mine", content=site.theirs.body, headers=kind).status_code == 201
    site.hub.refuse()
    for digest, upstream_blob in site.theirs.blobs.items():
        assert site.http.get(f"{repo}/blobs/{digest}").content == upstream_blob.read()
    assert site.http.get(f"{repo}/tags/list").json()["tags"] == ["mine"]


def test_only_stored_blobs_are_mounted_from_a_mirrored_name(site: HubAndServer) -> None:
    """A mount from a mirrored name succeeds if the mirror has stored the blob. For other blobs the server opens an
    upload session (202)."""
    site.serve(upstream='prefetch = "off"')
    config, layer = site.image.config.digest, site.image.layers[0].digest
    site.http.get("/v2/app/manifests/1")
    assert site.http.get(f"/v2/app/blobs/{config}").status_code == 200
    mount = {"mount": config, "from": "library/app"}
    assert site.http.post("/v2/mine/app/blobs/uploads/", params=mount).status_code == 201
    assert site.http.post("/v2/mine/app/blobs/uploads/", params={**mount, "mount": layer}).status_code == 202


def test_uncached_blob_is_streamed(site: HubAndServer) -> None:
    """The client gets the status and the first bytes of a blob that is not cached while the upstream holds back the
    rest. The rest follows as soon as the upstream sends it."""
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
    assert union(site.hub.sent_ranges(site.layer)) == [(0, SIZE)]


def test_ranges_before_and_after_a_blob_is_stored(site: HubAndServer) -> None:
    """Requests for a single range and for several ranges get the right bytes before the blob is stored and afterwards.
    A range past the end gets 416."""
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


def test_corrupt_blob_is_cut_off_before_its_end(site: HubAndServer) -> None:
    """If the upstream sends wrong bytes, the server closes the connection to the client before the last byte. Once the
    upstream sends the right bytes, the next request succeeds."""
    site.serve(upstream='prefetch = "off"')
    site.http.get("/v2/app/manifests/1")
    site.hub.fault(on="blob", match=site.encoded, corrupt=SIZE // 2, times=None)
    with pytest.raises(httpx2.TransportError):
        site.http.get(f"/v2/app/blobs/{site.layer}")
    site.hub.clear()
    assert site.http.get(f"/v2/app/blobs/{site.layer}").content == site.content


def test_stale_tag_has_a_warning(site: HubAndServer) -> None:
    """While the upstream is down, a manifest requested by a cached tag has a Warning header. A manifest requested by
    digest has none, because it cannot be outdated."""
    site.serve(upstream='tag_ttl = "0s"')
    fresh = site.http.get("/v2/app/manifests/1")
    assert "warning" not in fresh.headers
    site.hub.refuse()
    for method in ("GET", "HEAD"):
        answer = site.http.request(method, "/v2/app/manifests/1")
        assert (answer.status_code, answer.headers["docker-content-digest"]) == (200, site.image.digest)
        assert answer.headers["warning"].startswith('299 - "')
    assert "warning" not in site.http.get(f"/v2/app/manifests/{site.image.digest}").headers


def test_statuses_of_unknown_and_unavailable_content(site: HubAndServer) -> None:
    """Content that the upstream does not have gets 404. While the upstream is down, content that is not cached gets
    502."""
    site.serve(upstream='miss_ttl = "0s"')
    answer = site.http.get("/v2/app/manifests/none")
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (404, "MANIFEST_UNKNOWN")
    answer = site.http.get(f"/v2/app/blobs/sha256:{'0' * 64}")
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (404, "BLOB_UNKNOWN")
    site.hub.refuse()
    answer = site.http.get("/v2/app/manifests/2")
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (502, "UNAVAILABLE")


def test_silent_upstream_gives_504(site: HubAndServer) -> None:
    """If the upstream accepts requests but never responds, clients get 504 after the idle timeout."""
    site.serve(upstream='idle_timeout = "300ms"')
    site.hub.fault(on="any", method="", stall=True, times=None)
    answer = site.http.get("/v2/app/manifests/1")
    assert answer.status_code == 504


def test_rate_limit_of_the_upstream_is_passed_on(site: HubAndServer) -> None:
    """If the upstream answers 429 and there is no cached copy, the client gets 429 with the same Retry-After."""
    site.serve()
    site.hub.set(limit=0, retry_after=7)
    answer = site.http.get("/v2/app/manifests/1")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")


def test_read_only_server_still_mirrors(site: HubAndServer) -> None:
    """On a read-only server, pushes and deletions get 405. Images that clients pull are still fetched from the upstream
    and stored."""
    site.serve("--read-only")
    assert site.http.get("/v2/app/manifests/1").content == site.image.body
    assert site.http.get(f"/v2/app/blobs/{site.layer}").content == site.content
    assert site.push("team/app", "1")[0] == 405
    assert site.http.delete("/v2/app/manifests/1").status_code == 405
    site.hub.refuse()
    assert site.http.get(f"/v2/app/blobs/{site.layer}").content == site.content


def test_delete_removes_the_cached_copy(site: HubAndServer) -> None:
    """After a client has deleted a cached manifest, the next pull fetches it from the upstream again."""
    site.serve()
    site.http.get("/v2/app/manifests/1")
    assert site.http.delete(f"/v2/app/manifests/{site.image.digest}").status_code == 202
    requests_before = site.hub.count("manifest", "GET", site.image.digest)
    assert site.http.get("/v2/app/manifests/1").content == site.image.body
    assert site.hub.count("manifest", "GET", site.image.digest) == requests_before + 1


def test_tags_of_the_upstream_are_listed(site: HubAndServer) -> None:
    """The tag list of a mirrored name has the tags of the upstream, page by page, and the name that the client
    requested. The list of referrers is empty."""
    site.serve()
    answer = site.http.get("/v2/app/tags/list?n=1")
    assert answer.json() == {"name": "app", "tags": ["1"]}
    answer = site.http.get(answer.headers["link"].partition(">")[0].removeprefix("<"))
    assert answer.json() == {"name": "app", "tags": ["latest"]}
    assert site.http.get(f"/v2/app/referrers/{site.image.digest}").json()["manifests"] == []


def test_credentials_for_docker_hub_are_ignored(site: HubAndServer) -> None:
    """docker sends its login for Docker Hub to its mirror. The mirror ignores the login and does not log it."""
    site.serve()
    answer = site.http.get("/v2/app/manifests/1", headers={"Authorization": "Basic c3RyYXk6bG9naW4="})
    assert answer.status_code == 200
    assert "c3RyYXk6bG9naW4" not in site.server.log_text()


def test_server_starts_while_the_upstream_is_down(site: HubAndServer) -> None:
    """The server starts although the upstream is down, and images can be pushed to it and pulled from it."""
    site.hub.refuse()
    site.serve()
    assert site.http.head(f"/v2/mine/app/blobs/{site.layer}").status_code == 404
    status, pushed_body = site.push("mine/app", "1")
    assert (status, site.http.get("/v2/mine/app/manifests/1").content) == (201, pushed_body)
