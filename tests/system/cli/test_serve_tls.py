"""`entrepot serve` over TLS: errors at the start, and transfers of blobs."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import ssl
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx2
import pytest

from tests.fakes.certificate_authority import CertificateAuthority, KeyPair
from tests.fakes.commands import entrepot, error_line
from tests.fakes.hub.hub import hub
from tests.fakes.plain_client import plain_request
from tests.fakes.server_process import RegistryServer, running_server
from tests.fakes.upstream_content import UpstreamContent, noise_image

MIB = 1024 * 1024
SIZE = 5 * MIB + 77


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority: CertificateAuthority) -> KeyPair:
    return authority.sign("localhost")


def variables(pair: KeyPair) -> dict[str, str]:
    return {"ENTREPOT_TLS__CERTIFICATE": str(pair.certificate), "ENTREPOT_TLS__KEY": str(pair.key)}


@pytest.fixture
def server(tmp_path: Path, pair: KeyPair) -> Iterator[RegistryServer]:
    with running_server(tmp_path, env=variables(pair)) as started:
        yield started


@pytest.fixture
def client(server: RegistryServer, authority: CertificateAuthority) -> Iterator[httpx2.Client]:
    context = ssl.create_default_context(cafile=authority.certificate)
    with httpx2.Client(base_url=server.url, verify=context, timeout=30) as opened:
        yield opened


# The start


def test_start(server: RegistryServer, client: httpx2.Client) -> None:
    """The banner has the https address, and the server answers there."""
    assert f"listens on https://127.0.0.1:{server.port}\n" in server.log_text()
    assert client.get("/v2/").status_code == 200
    assert plain_request("GET", f"http://127.0.0.1:{server.port}/v2/").status_code == 400


def fails(folder: Path, **settings: str | Path) -> str:
    given = {f"ENTREPOT_TLS__{name.upper()}": str(value) for name, value in settings.items()}
    line = error_line(entrepot("serve", "--listen", "127.0.0.1:0", folder=folder, **given), 1)
    assert not (folder / "data").exists()
    return line


def test_a_start_that_cannot_be(tmp_path: Path, authority: CertificateAuthority, pair: KeyPair) -> None:
    """With missing, mismatched or expired files, or contradicting settings, the start ends with one line and exit code
    1, and creates nothing."""
    other, certificate, key = authority.sign("other"), pair.certificate, pair.key
    assert "no such file" in fails(tmp_path, certificate=tmp_path / "none.pem", key=key)
    assert "no such file" in fails(tmp_path, certificate=certificate, key=tmp_path / "none.key")
    assert "does not belong" in fails(tmp_path, certificate=certificate, key=other.key)
    assert "expired on" in fails(tmp_path, certificate=authority.expired(pair).certificate, key=key)
    assert "protected by a password" in fails(tmp_path, certificate=certificate, key=authority.locked(pair).key)
    assert "no such file" in fails(tmp_path, certificate=certificate, key=key, client_ca=tmp_path / "none.pem")
    assert "names no certificate" in fails(tmp_path, key=key)
    assert "no authority for client certificates" in fails(
        tmp_path, certificate=certificate, key=key, client_auth="optional"
    )


def test_a_key_that_only_root_can_read(tmp_path: Path, authority: CertificateAuthority, pair: KeyPair) -> None:
    """The key is read before the process changes from root to the owner of the data directory."""
    data = tmp_path / "data"
    data.mkdir()
    os.chown(data, owner := 65534 if os.geteuid() == 0 else os.geteuid(), -1)
    assert pair.key.stat().st_mode & 0o077 == 0
    context = ssl.create_default_context(cafile=authority.certificate)
    with running_server(tmp_path, env=variables(pair), own_interpreter=True) as server:
        status = Path(f"/proc/{server.worker_pids()[0]}/status").read_text()
        assert "Uid:" + f"\t{owner}" * 4 + "\n" in status
        assert httpx2.get(server.url + "/v2/", verify=context).status_code == 200


def test_a_client_ca_alone_asks_for_certificates(
    tmp_path: Path, authority: CertificateAuthority, pair: KeyPair
) -> None:
    """With `client_ca` and without `client_auth`, clients without a certificate are refused."""
    env = {**variables(pair), "ENTREPOT_TLS__CLIENT_CA": str(authority.certificate)}
    own = authority.sign("client", client=True)
    context = ssl.create_default_context(cafile=authority.certificate)
    with running_server(tmp_path, env=env) as server:
        with pytest.raises((httpx2.ReadError, httpx2.ConnectError, httpx2.RemoteProtocolError)):
            httpx2.get(server.url + "/v2/", verify=context)
        context.load_cert_chain(own.certificate, own.key)
        assert httpx2.get(server.url + "/v2/", verify=context).status_code == 200


def test_what_clients_are_to_set_up(tmp_path: Path, pair: KeyPair) -> None:
    """`entrepot client` prints https addresses if the port speaks TLS."""
    done = entrepot("client", "docker", folder=tmp_path, **variables(pair))
    assert "https://127.0.0.1:5000" in done.stdout


# Blobs


def push(client: httpx2.Client, body: bytes) -> str:
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    where = client.post("/v2/team/app/blobs/uploads/").headers["location"]
    assert client.put(where, params={"digest": digest}, content=body).status_code == 201
    return f"/v2/team/app/blobs/{digest}"


def test_a_blob_and_its_ranges(client: httpx2.Client) -> None:
    """A pushed blob can be pulled completely, by one range, and by several ranges."""
    body = os.urandom(SIZE)
    path = push(client, body)
    for _ in range(2):
        assert client.get(path).content == body
    for start, stop in ((0, 0), (MIB - 1, 3 * MIB), (SIZE - 1, SIZE - 1)):
        answer = client.get(path, headers={"range": f"bytes={start}-{stop}"})
        assert (answer.status_code, answer.content) == (206, body[start : stop + 1])
    answer = client.get(path, headers={"range": f"bytes=0-9,{MIB}-{3 * MIB}"})
    assert answer.status_code == 206
    assert body[MIB : 3 * MIB + 1] in answer.content
    assert client.get(path, headers={"range": f"bytes={SIZE}-"}).status_code == 416


def test_a_blob_in_chunks(client: httpx2.Client) -> None:
    """An upload can be sent in several PATCHes, of which the first is larger than a buffer."""
    body = os.urandom(SIZE)
    where = client.post("/v2/team/app/blobs/uploads/").headers["location"]
    for start, stop in ((0, 3 * MIB), (3 * MIB, 3 * MIB + 1), (3 * MIB + 1, SIZE)):
        answer = client.patch(where, content=body[start:stop], headers={"content-range": f"{start}-{stop - 1}"})
        assert answer.status_code == 202
        where = answer.headers["location"]
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    assert client.put(where, params={"digest": digest}).status_code == 201
    assert client.get(f"/v2/team/app/blobs/{digest}").content == body


def test_curl(server: RegistryServer, client: httpx2.Client, authority: CertificateAuthority) -> None:
    """curl downloads a blob, and resumes a download."""
    body = os.urandom(SIZE)
    url = server.url + push(client, body)
    curl = ["curl", "--silent", "--show-error", "--fail", "--cacert", str(authority.certificate)]
    done = subprocess.run([*curl, url], capture_output=True, timeout=30, check=True)
    assert done.stdout == body
    done = subprocess.run([*curl, "--range", "100-", url], capture_output=True, timeout=30, check=True)
    assert done.stdout == body[100:]


def test_a_blob_that_is_still_coming(tmp_path: Path, authority: CertificateAuthority, pair: KeyPair) -> None:
    """While a blob is being downloaded from the upstream, clients get the bytes as they arrive. If one client
    disconnects, the others are not affected."""
    content = UpstreamContent()
    image = content.add("library/app", noise_image("app", 1000, SIZE), "1")
    layer = image.layers[-1]
    with hub(tmp_path, content, send_buffer=65536) as upstream:
        settings = {"name": "docker.io", "default": True, "endpoints": [upstream.url], "connections": 1}
        env = {**variables(pair), "ENTREPOT_UPSTREAM": json.dumps([{**settings, "prefetch": "off"}])}
        with running_server(tmp_path, env=env) as server:
            upstream.fault(on="blob", match=layer.digest.partition(":")[2], stall_after=2 * MIB)
            with asking(server, authority, f"/v2/library/app/blobs/{layer.digest}") as first:
                begun = read(first, MIB)
                with asking(server, authority, f"/v2/library/app/blobs/{layer.digest}") as other:
                    assert read(other, MIB) == begun
                span = {"Range": f"bytes={MIB}-{MIB + 9}"}
                with asking(server, authority, f"/v2/library/app/blobs/{layer.digest}", span) as part:
                    assert part.read() == layer.read()[MIB : MIB + 10]
                upstream.release()
                assert begun + first.read() == layer.read()


@contextlib.contextmanager
def asking(
    server: RegistryServer, authority: CertificateAuthority, path: str, headers: Mapping[str, str] | None = None
) -> Iterator[http.client.HTTPResponse]:
    context = ssl.create_default_context(cafile=authority.certificate)
    connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=30, context=context)
    try:
        connection.request("GET", path, headers=dict(headers or {}))
        yield connection.getresponse()
    finally:
        connection.close()


def read(answer: http.client.HTTPResponse, count: int) -> bytes:
    data = answer.read(count)
    assert len(data) == count
    return data
