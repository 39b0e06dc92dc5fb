"""Tests of quotas, and of the minimum of free disk space, with a server of two workers and clients over HTTP."""

from __future__ import annotations

import hashlib
import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest

from storage.content import OCI_MANIFEST
from tests.fakes.commands import entrepot_output
from tests.fakes.mirror_site import MirrorSite, wait_until
from tests.fakes.plain_client import plain_client
from tests.fakes.server_process import RegistryServer, running_server

KIB = 1024
QUOTA = '[[quota]]\nprefix = "team/"\nmax_size = "10KiB"\nmax_tags = 2\n'


def start(folder: Path, settings: str) -> Any:
    """Starts a server with these settings."""
    (folder / "entrepot.toml").write_text(settings)
    return running_server(folder, "--config", str(folder / "entrepot.toml"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RegistryServer]:
    """A server with the quota `QUOTA`, after it has counted the stored content."""
    with start(tmp_path, QUOTA) as running:
        with plain_client(running.url) as client:
            wait_until(lambda: quotas(tmp_path)[0]["complete"], "the quota to be counted")
            assert client.get("/v2/").status_code == 200
        yield running


def quotas(folder: Path) -> list[dict[str, Any]]:
    """Returns the output of `entrepot quota list`."""
    listed: list[dict[str, Any]] = json.loads(
        entrepot_output("quota", "list", "--json", "--config", "entrepot.toml", "--data", "data", folder=folder)
    )
    return listed


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def push(server: RegistryServer, repo: str, data: bytes) -> httpx2.Response:
    """Pushes a blob with a POST and a PUT. Returns the last response."""
    with plain_client(server.url) as client:
        location = client.post(f"/v2/{repo}/blobs/uploads/").headers["location"]
        return client.put(location, params={"digest": digest_of(data)}, content=data)


def answer_before_body(server: RegistryServer, method: str, path: str, length: int) -> tuple[int, dict[str, Any]]:
    """Sends a request with a Content-Length and without its body. Returns the status and the error."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.putrequest(method, path)
        connection.putheader("Content-Length", str(length))
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())["errors"][0]
    finally:
        connection.close()


def test_parallel_pushes_never_exceed_a_quota(server: RegistryServer, tmp_path: Path) -> None:
    """30 clients push 1 KiB each through two workers, and the quota is 10 KiB. Exactly ten pushes succeed. The others
    get DENIED with a message that states the sizes."""
    blobs = [f"{number}".encode().ljust(KIB, b".") for number in range(30)]
    with ThreadPoolExecutor(15) as clients:
        answers = list(clients.map(lambda number: push(server, f"team/app{number % 3}", blobs[number]), range(30)))
    refused = [answer for answer in answers if answer.status_code != 201]
    assert len(answers) - len(refused) == 10
    [error] = refused[0].json()["errors"]
    assert (refused[0].status_code, error["code"]) == (403, "DENIED")
    assert {answer.json()["errors"][0]["message"] for answer in refused} == {
        "team/ may hold 10 KiB and holds 10 KiB; this blob of 1 KiB does not fit. Delete what is not needed any more, "
        "or ask the operator for more room"
    }
    [quota] = quotas(tmp_path)
    assert (quota["size"], quota["blobs"]) == (10 * KIB, 10)
    accepted = next(blob for blob, answer in zip(blobs, answers, strict=True) if answer.status_code == 201)
    assert push(server, "other/app", accepted).status_code == 201
    stored_files = {path.name for path in (server.data / "blobs").rglob("*") if path.is_file()}
    assert len(stored_files) == 10


def test_too_large_content_length_is_refused_before_the_body(server: RegistryServer) -> None:
    """A POST, PATCH or PUT whose Content-Length does not fit into the quota is refused before the body is sent. A blob
    that is already stored under the prefix of the quota is accepted."""
    data = b"a" * 8 * KIB
    assert push(server, "team/app", data).status_code == 201
    too_long = 3 * KIB
    other_digest = digest_of(b"other")
    status, error = answer_before_body(server, "POST", f"/v2/team/web/blobs/uploads/?digest={other_digest}", too_long)
    assert (status, error["code"]) == (403, "DENIED")
    assert "team/ may hold 10 KiB and holds 8 KiB; this blob of 3 KiB does not fit" in error["message"]
    with plain_client(server.url) as client:
        location = client.post("/v2/team/web/blobs/uploads/").headers["location"]
        assert answer_before_body(server, "PATCH", location, too_long)[0] == 403
        assert answer_before_body(server, "PUT", f"{location}?digest={other_digest}", too_long)[0] == 403
        assert push(server, "team/web", bytes(20_000 * KIB)).status_code == 403
        assert client.patch(location, content=b"b" * KIB).status_code == 202
        assert client.delete(location).status_code == 204
        answer = client.post("/v2/team/web/blobs/uploads/", params={"digest": digest_of(data)}, content=data)
        assert answer.status_code == 201, answer.text


def test_tags_and_mounts_count(server: RegistryServer) -> None:
    """Tags count against `max_tags`, and a mounted blob counts against `max_size`. Deleting a tag makes room for
    another."""
    config = b"{}"
    assert push(server, "team/app", config).status_code == 201
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest_of(config), "size": 2},
        "layers": [],
    }
    with plain_client(server.url) as client:

        def tag(name: str) -> httpx2.Response:
            headers = {"content-type": OCI_MANIFEST}
            return client.put(f"/v2/team/app/manifests/{name}", content=json.dumps(document).encode(), headers=headers)

        assert [tag(name).status_code for name in ("one", "two", "one", "three")] == [201, 201, 201, 403]
        assert "team/ may have 2 tags and has 2" in tag("three").json()["errors"][0]["message"]
        assert client.delete("/v2/team/app/manifests/one").status_code == 202
        assert tag("three").status_code == 201
        large = b"x" * 11 * KIB
        assert push(server, "other/app", large).status_code == 201
        mount = {"mount": digest_of(large), "from": "other/app"}
        assert client.post("/v2/team/app/blobs/uploads/", params=mount).status_code == 403


@pytest.mark.slow
def test_new_quota_counts_existing_content(tmp_path: Path) -> None:
    """A quota that was added to the settings counts the content that was stored before. A quota that was removed has no
    effect any more."""
    data = [bytes([number]) * 6 * KIB for number in range(3)]
    with start(tmp_path, "") as server:
        assert push(server, "team/app", data[0]).status_code == 201
    with start(tmp_path, QUOTA) as server:
        wait_until(lambda: bool(quotas(tmp_path)) and quotas(tmp_path)[0]["complete"], "the quota to be counted")
        assert quotas(tmp_path)[0]["size"] == 6 * KIB
        assert push(server, "team/app", data[1]).status_code == 403
        end = "counted what is stored; all limits are in effect"
        wait_until(lambda: end in server.log_text(), "the log line about the end of the count")
    with start(tmp_path, "") as server:
        wait_until(lambda: quotas(tmp_path) == [], "the quota to be removed")
        assert push(server, "team/app", data[2]).status_code == 201


@pytest.mark.slow
def test_pushes_are_refused_if_the_disk_is_almost_full(tmp_path: Path) -> None:
    """If the disk is almost full, pushes get 507 before their bytes are received, and the health check reports the
    reason. Pulls, deletions and the cancellation of an upload succeed."""
    data = b"a" * KIB
    with start(tmp_path, "") as server, plain_client(server.url) as client:
        assert push(server, "team/app", data).status_code == 201
        location = client.post("/v2/team/app/blobs/uploads/").headers["location"]
    with start(tmp_path, '[disk]\nmin_free = "1000TiB"\n') as server, plain_client(server.url) as client:
        # The restarted server has another port, so only the path of the location is used.
        path = location.partition(f":{location.split(':')[2].split('/')[0]}")[2] if "://" in location else location
        for method, target in (
            ("POST", f"/v2/team/app/blobs/uploads/?digest={digest_of(b'b')}"),
            ("PATCH", path),
            ("PUT", f"{path}?digest={digest_of(b'b')}"),
            ("PUT", "/v2/team/app/manifests/v1"),
        ):
            status, error = answer_before_body(server, method, target, 1)
            assert (status, error["code"]) == (507, "STORAGE_FULL"), method
            assert error["message"].startswith("the disk is almost full: less than 1000 TiB would stay free")
        assert client.post("/v2/team/app/blobs/uploads/").status_code == 507
        assert answer_before_body(server, "PUT", "/v2/team/app/manifests/v1", 100 << 40)[0] == 507
        with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
            connection.request("PUT", "/v2/team/app/manifests/v1", b"{}" * KIB)  # this body is read, but not used
            assert (answer := connection.getresponse()).status == 507
            assert "almost full" in answer.read().decode()
            connection_socket = connection.sock
            connection.request("GET", "/v2/")
            assert (connection.getresponse().status, connection.sock) == (200, connection_socket)
        assert client.delete(path).status_code == 204
        blob = f"/v2/team/app/blobs/{digest_of(data)}"
        assert client.get(blob).content == data
        health = client.get("/health/ready").json()
        assert health["status"] == "disk full"
        assert "almost full" in health["reason"]
        assert client.delete(blob).status_code == 202
        wait_until(lambda: "the disk is almost full" in server.log_text(), "the log line about the disk")


@pytest.mark.slow
def test_mirror_works_if_the_disk_is_almost_full(site: MirrorSite) -> None:
    """If the disk is almost full, a mirror serves cached content. A blob that is not cached, or a range of it, is
    passed from the upstream to the client without being stored."""
    site.start(1000, 2000, settings='prefetch = "off"')
    layers = site.image.layers
    site.get_manifest()
    assert site.http.get(f"/v2/library/app/blobs/{layers[0].digest}").content == layers[0].read()
    site.server.stop()
    config = site.folder / "entrepot.toml"
    config.write_text('[disk]\nmin_free = "1000TiB"\n' + config.read_text())
    site.serve()
    site.get_manifest()
    assert site.http.get(f"/v2/library/app/blobs/{layers[0].digest}").content == layers[0].read()
    path = f"/v2/library/app/blobs/{layers[1].digest}"
    for _ in range(2):
        assert site.http.get(path).content == layers[1].read()
    part = site.http.get(path, headers={"range": "bytes=500-"})
    assert (part.status_code, part.content) == (206, layers[1].read()[500:])
    assert site.stored_files() == []
