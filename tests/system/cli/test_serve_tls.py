"""Tests of `entrepot serve` with TLS: the start, its errors, and transfers of blobs."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx2
import pytest

from tests.fakes.certificate_authority import CertificateAuthority, KeyPair
from tests.fakes.commands import entrepot, error_line
from tests.fakes.hub.hub import hub
from tests.fakes.plain_client import plain_request
from tests.fakes.server_process import ROOT, RegistryServer, running_server
from tests.fakes.upstream_content import UpstreamContent, noise_image

MIB = 1024 * 1024
SIZE = 5 * MIB + 77
"""The size of the pushed blobs in bytes."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority: CertificateAuthority) -> KeyPair:
    return authority.sign("localhost")


def variables(pair: KeyPair) -> dict[str, str]:
    """Returns the environment variables for a server with this certificate."""
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
    """The banner has the https address, and the server responds at this address. A plain HTTP request gets 400."""
    assert f"listens on https://127.0.0.1:{server.port}\n" in server.log_text()
    assert client.get("/v2/").status_code == 200
    assert plain_request("GET", f"http://127.0.0.1:{server.port}/v2/").status_code == 400


def start_fails(folder: Path, **settings: str | Path) -> str:
    """Starts a server with these TLS settings, which must fail without creating a data directory. Returns the error."""
    environment = {f"ENTREPOT_TLS__{name.upper()}": str(value) for name, value in settings.items()}
    line = error_line(entrepot("serve", "--listen", "127.0.0.1:0", folder=folder, **environment), 1)
    assert not (folder / "data").exists()
    return line


def test_start_with_wrong_files_or_settings(tmp_path: Path, authority: CertificateAuthority, pair: KeyPair) -> None:
    """If a file is missing, expired or does not match the others, or if the settings are contradictory, the start fails
    with one line and exit code 1."""
    other, certificate, key = authority.sign("other"), pair.certificate, pair.key
    assert "no such file" in start_fails(tmp_path, certificate=tmp_path / "none.pem", key=key)
    assert "no such file" in start_fails(tmp_path, certificate=certificate, key=tmp_path / "none.key")
    assert "does not belong" in start_fails(tmp_path, certificate=certificate, key=other.key)
    assert "expired on" in start_fails(tmp_path, certificate=authority.expired(pair).certificate, key=key)
    assert "protected by a password" in start_fails(tmp_path, certificate=certificate, key=authority.locked(pair).key)
    assert "no such file" in start_fails(tmp_path, certificate=certificate, key=key, client_ca=tmp_path / "none.pem")
    assert "names no certificate" in start_fails(tmp_path, key=key)
    assert "no authority for client certificates" in start_fails(
        tmp_path, certificate=certificate, key=key, client_auth="optional"
    )


def test_a_key_that_only_root_can_read(tmp_path: Path, authority: CertificateAuthority, pair: KeyPair) -> None:
    """If root starts the server, it reads the key as root, and then runs with the uid of the owner of the data
    directory."""
    data = tmp_path / "data"
    data.mkdir()
    os.chown(data, owner := 65534 if os.geteuid() == 0 else os.geteuid(), -1)
    assert pair.key.stat().st_mode & 0o077 == 0
    context = ssl.create_default_context(cafile=authority.certificate)
    with running_server(tmp_path, env=variables(pair), own_interpreter=True) as server:
        status = Path(f"/proc/{server.worker_pids()[0]}/status").read_text()
        assert "Uid:" + f"\t{owner}" * 4 + "\n" in status
        assert httpx2.get(server.url + "/v2/", verify=context).status_code == 200


def test_client_ca_alone_requires_certificates(tmp_path: Path, authority: CertificateAuthority, pair: KeyPair) -> None:
    """If `client_ca` is set and `client_auth` is not, clients need a certificate. `entrepot doctor`, which has none,
    finds no problem with the server's address."""
    env = {**variables(pair), "ENTREPOT_TLS__CLIENT_CA": str(authority.certificate)}
    client_pair = authority.sign("client", client=True)
    context = ssl.create_default_context(cafile=authority.certificate)
    with running_server(tmp_path, env=env) as server:
        with pytest.raises((httpx2.ReadError, httpx2.ConnectError, httpx2.RemoteProtocolError)):
            httpx2.get(server.url + "/v2/", verify=context)
        context.load_cert_chain(client_pair.certificate, client_pair.key)
        assert httpx2.get(server.url + "/v2/", verify=context).status_code == 200
        doctor = ("doctor", "--json", "--data", server.data, "--listen", server.address)
        done = entrepot(*doctor, folder=tmp_path, **env, SSL_CERT_FILE=str(authority.certificate))
        (finding,) = (each for each in json.loads(done.stdout)["findings"] if each["check"] == "address")
        assert finding["level"] == "ok", finding
        assert "requires a client certificate" in finding["what"]


def test_client_settings_have_the_https_address(tmp_path: Path, pair: KeyPair) -> None:
    """`entrepot client` prints an https address if the settings have a certificate."""
    result = entrepot("client", "docker", folder=tmp_path, **variables(pair))
    assert "https://127.0.0.1:5000" in result.stdout


def is_healthy(listen: str, env: Mapping[str, str]) -> bool:
    """Runs the health check of the image in deploy/Dockerfile with these variables. Returns whether it succeeds."""
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", "")
    (command,) = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", dockerfile, re.MULTILINE)
    python, *arguments = json.loads(command)
    assert python == "python"
    environment = {**os.environ, "ENTREPOT_LISTEN": listen, **env}
    check = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, timeout=60)
    return check.returncode == 0


def test_health_check_of_the_image(tmp_path: Path, server: RegistryServer, pair: KeyPair) -> None:
    """The health check of the image succeeds without TLS, with TLS set in variables, and with TLS set in a file, where
    no variable names the certificate. It fails if the server has ended."""
    listen = f"0.0.0.0:{server.port}"
    assert is_healthy(listen, variables(pair))
    assert is_healthy(listen, {})
    assert server.stop() == 0
    assert not is_healthy(listen, {})
    with running_server(tmp_path / "plain", workers=1) as plain:
        assert is_healthy(f"0.0.0.0:{plain.port}", {})


# Blobs


def push(client: httpx2.Client, body: bytes) -> str:
    """Pushes a blob. Returns its path."""
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    location = client.post("/v2/team/app/blobs/uploads/").headers["location"]
    assert client.put(location, params={"digest": digest}, content=body).status_code == 201
    return f"/v2/team/app/blobs/{digest}"


def test_a_blob_and_its_ranges(client: httpx2.Client) -> None:
    """A pushed blob can be pulled completely, with one range, and with several ranges."""
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
    """A blob can be pushed with several PATCH requests, the first of which is larger than a buffer."""
    body = os.urandom(SIZE)
    location = client.post("/v2/team/app/blobs/uploads/").headers["location"]
    for start, stop in ((0, 3 * MIB), (3 * MIB, 3 * MIB + 1), (3 * MIB + 1, SIZE)):
        answer = client.patch(location, content=body[start:stop], headers={"content-range": f"{start}-{stop - 1}"})
        assert answer.status_code == 202
        location = answer.headers["location"]
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    assert client.put(location, params={"digest": digest}).status_code == 201
    assert client.get(f"/v2/team/app/blobs/{digest}").content == body


def test_curl(server: RegistryServer, client: httpx2.Client, authority: CertificateAuthority) -> None:
    """curl can download a blob, and the rest of a blob from an offset."""
    body = os.urandom(SIZE)
    url = server.url + push(client, body)
    curl = ["curl", "--silent", "--show-error", "--fail", "--cacert", str(authority.certificate)]
    result = subprocess.run([*curl, url], capture_output=True, timeout=30, check=True)
    assert result.stdout == body
    result = subprocess.run([*curl, "--range", "100-", url], capture_output=True, timeout=30, check=True)
    assert result.stdout == body[100:]


def test_blob_that_is_still_being_downloaded(tmp_path: Path, authority: CertificateAuthority, pair: KeyPair) -> None:
    """While the mirror downloads a blob from its upstream, several clients get the bytes as they arrive, also by a
    range. If one client disconnects, the others are not affected."""
    content = UpstreamContent()
    image = content.add("library/app", noise_image("app", 1000, SIZE), "1")
    layer = image.layers[-1]
    with hub(tmp_path, content, send_buffer=65536) as upstream:
        settings = {"name": "docker.io", "default": True, "endpoints": [upstream.url], "connections": 1}
        env = {**variables(pair), "ENTREPOT_UPSTREAM": json.dumps([{**settings, "prefetch": "off"}])}
        with running_server(tmp_path, env=env) as server:
            upstream.fault(on="blob", match=layer.digest.partition(":")[2], stall_after=2 * MIB)
            with requesting(server, authority, f"/v2/library/app/blobs/{layer.digest}") as first:
                first_bytes = read(first, MIB)
                with requesting(server, authority, f"/v2/library/app/blobs/{layer.digest}") as other:
                    assert read(other, MIB) == first_bytes
                span = {"Range": f"bytes={MIB}-{MIB + 9}"}
                with requesting(server, authority, f"/v2/library/app/blobs/{layer.digest}", span) as part:
                    assert part.read() == layer.read()[MIB : MIB + 10]
                upstream.release()
                assert first_bytes + first.read() == layer.read()


@contextlib.contextmanager
def requesting(
    server: RegistryServer, authority: CertificateAuthority, path: str, headers: Mapping[str, str] | None = None
) -> Iterator[http.client.HTTPResponse]:
    """Sends a GET over TLS, and yields the response, whose body may still be arriving."""
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
