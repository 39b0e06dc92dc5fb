"""Tests of nginx and Caddy in front of the registry, with the configuration files in deploy/."""

from __future__ import annotations

import http.client
import shutil
import ssl
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.certificate_authority import CertificateAuthority
from tests.fakes.client_images import MIB, ClientImage, image, layer, noise
from tests.fakes.clients.docker_engine import DockerEngine, running_docker
from tests.fakes.clients.programs import wait_until
from tests.fakes.commands import entrepot_output
from tests.fakes.own_network import own_network
from tests.fakes.reverse_proxies import HOST, running_caddy, running_nginx
from tests.fakes.server_process import RegistryServer, running_server

CLIENT = "127.0.0.2"
"""The IP address of the client. The proxies connect to the registry from 127.0.0.1."""
SETTINGS = {
    "ENTREPOT_PUBLIC_URL": f"https://{HOST}",
    "ENTREPOT_TRUSTED_PROXIES": "127.0.0.1",
    "ENTREPOT_EVENTS__KEEP": "1h",
}
LOGIN = {"Authorization": "Basic " + b64encode(f"{ADMIN}:{PASSWORD}".encode()).decode()}
DEADLINE_SECONDS = 60.0
PROXIES = {"nginx": running_nginx, "caddy": running_caddy}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Yields a folder with a short absolute path, because the path of a socket can have at most 107 bytes."""
    created = Path(tempfile.mkdtemp(prefix="ent-", dir="/tmp"))
    yield created
    shutil.rmtree(created)


@pytest.fixture(scope="module")
def account(folder: Path) -> None:
    """Adds an admin account to the data directory of the registry."""
    (folder / "registry").mkdir()
    command = ("user", "add", ADMIN, "--admin", "--password-file", "-")
    entrepot_output(*command, folder=folder / "registry", stdin_text=PASSWORD)


@pytest.fixture(scope="module")
def network(account: None) -> Iterator[None]:
    with own_network():
        yield


@pytest.fixture(scope="module")
def server(network: None, folder: Path) -> Iterator[RegistryServer]:
    """Runs the registry at the address in the configuration files of the proxies."""
    with running_server(folder / "registry", listen="127.0.0.1:5000", env=SETTINGS, own_interpreter=True) as running:
        yield running


@pytest.fixture(scope="module")
def docker(network: None, folder: Path) -> Iterator[DockerEngine]:
    (folder / "docker").mkdir()
    with running_docker(folder / "docker") as running:
        yield running


@pytest.fixture(scope="module")
def authority(folder: Path) -> CertificateAuthority:
    return CertificateAuthority(folder)


@pytest.fixture(scope="module", params=PROXIES)
def proxy(request: pytest.FixtureRequest, server: RegistryServer, authority: CertificateAuthority) -> Iterator[str]:
    """Runs a proxy in front of the server, and yields its name."""
    name = str(request.param)
    log_folder = Path(tempfile.mkdtemp(prefix="ent-", dir="/tmp"))
    with PROXIES[name](authority.sign(name), log_folder) as log:
        yield name
        # nginx logs a warning when it buffers a body on its disk.
        assert "buffered" not in log.read_text()
    shutil.rmtree(log_folder)


@pytest.fixture
def large() -> ClientImage:
    """Returns an image with a layer that is larger than the default limit of proxies for a request body."""
    return image("behind a proxy", layer({"large": noise("proxy", 20 * MIB)}))


def test_push_and_pull(docker: DockerEngine, proxy: str, large: ClientImage) -> None:
    """docker can log in through the proxy, and push and pull an image with a large layer."""
    docker("login", "--username", ADMIN, "--password", PASSWORD, HOST)
    name = f"{HOST}/behind/{proxy}:1"
    docker.load(large, name)
    docker("push", name)
    docker.remove_image(name)
    docker("pull", name)
    assert docker.output_of(name) == "behind a proxy\n"


def test_the_registry_sees_the_client(proxy: str, server: RegistryServer, authority: CertificateAuthority) -> None:
    """The registry logs the address of the client. The client cannot change it with an X-Forwarded-For header."""
    path = f"/v2/seen/{proxy}/tags/list"
    with closing(connection(authority)) as client:
        client.request("GET", path, headers={"X-Forwarded-For": "192.0.2.1"})
        assert client.getresponse().status == 401

    def lines() -> list[str]:
        return [line for line in server.log_text().splitlines() if f"GET {path} " in line]

    wait_until(lambda: bool(lines()), DEADLINE_SECONDS, server.log_text)
    (line,) = lines()
    assert f"address={CLIENT} " in line


def test_a_stream_of_events(proxy: str, authority: CertificateAuthority) -> None:
    """The proxy forwards an event of a stream at once, while the response is still open."""
    with closing(connection(authority)) as reader, closing(connection(authority)) as pusher:
        reader.request("GET", "/api/v1/events", headers={"Accept": "text/event-stream", **LOGIN})
        stream = reader.getresponse()
        assert stream.status == 200
        repo = f"event/{proxy}"
        body = b'{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []}'
        headers = {"Content-Type": "application/vnd.oci.image.index.v1+json", **LOGIN}
        pusher.request("PUT", f"/v2/{repo}/manifests/1", body, headers)
        assert pusher.getresponse().status == 201
        while repo.encode() not in (line := stream.readline()):
            assert line


def test_plain_http_redirects_to_tls(proxy: str) -> None:
    """A request without TLS is redirected to the same page with TLS."""
    with closing(http.client.HTTPConnection(HOST, 80, timeout=60)) as client:
        client.request("GET", "/ui/", headers={"Host": HOST})
        answer = client.getresponse()
        assert (answer.status, answer.headers["Location"]) == (308, f"https://{HOST}/ui/")


def connection(authority: CertificateAuthority) -> http.client.HTTPSConnection:
    """Returns a connection to the proxy from the address CLIENT. It verifies the certificate of the proxy."""
    trusted = ssl.create_default_context(cafile=str(authority.certificate))
    return http.client.HTTPSConnection(HOST, 443, context=trusted, timeout=60, source_address=(CLIENT, 0))
