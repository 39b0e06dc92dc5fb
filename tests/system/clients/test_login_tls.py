"""Tests with real clients that log in over TLS. A certificate authority of the tests has signed the server's
certificate."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.certificate_authority import CertificateAuthority
from tests.fakes.client_images import ClientImage
from tests.fakes.clients.container_tools import ContainerTools
from tests.fakes.clients.containerd_daemon import Containerd
from tests.fakes.clients.cutting_proxy import cutting_proxy
from tests.fakes.clients.docker_engine import DockerEngine, running_docker
from tests.fakes.clients.member_site import WRONG, ClientLogin, logged_out, tools_logged_out
from tests.fakes.clients.programs import PATH, ForeignProgram, wait_until
from tests.fakes.commands import entrepot_output
from tests.fakes.server_process import RegistryServer, running_server

from .test_podman import loaded

DOCUMENTATION_ADDRESS = "192.0.2.10"
"""An address for documentation (RFC 5737), at which docker reaches the registry through a proxy. At a local address,
docker would accept any certificate."""
ALICE, EVE = ClientLogin("alice", "a password of alice"), ClientLogin("eve", "a password of eve's own")


@dataclass(frozen=True)
class TlsServer:
    """A server with TLS. `trusted`: a folder with the file ca.crt, like those in docker's certs.d."""

    server: RegistryServer
    trusted: Path

    @property
    def address(self) -> str:
        return self.server.address

    @property
    def authority(self) -> str:
        """The path of the file ca.crt."""
        return str(self.trusted / "ca.crt")


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    """Runs a server with TLS and accounts. alice may push below `team`, everyone may pull below `team/open`, and eve
    has an account without rights."""
    folder = tmp_path_factory.mktemp("secret")
    authority = CertificateAuthority(folder)
    pair, trusted = authority.sign("localhost", also=DOCUMENTATION_ADDRESS), folder / "trusted"
    trusted.mkdir()
    (trusted / "ca.crt").write_bytes(authority.certificate.read_bytes())
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, stdin_text=PASSWORD)
    for login in (ALICE, EVE):
        entrepot_output("user", "add", login.name, "--password-file", "-", folder=folder, stdin_text=login.secret)
    entrepot_output("grant", "add", "team/**", "pull,push", "user:alice", folder=folder)
    entrepot_output("grant", "add", "team/open/**", "pull", "everyone", folder=folder)
    variables = {"ENTREPOT_TLS__CERTIFICATE": str(pair.certificate), "ENTREPOT_TLS__KEY": str(pair.key)}
    with running_server(folder, env=variables) as running:
        yield TlsServer(running, trusted)


@pytest.fixture(scope="module")
def far_docker(tls_server: TlsServer, short_folder: Path) -> Iterator[DockerEngine]:
    """Runs a dockerd that reaches the registry at DOCUMENTATION_ADDRESS. It trusts the certificate authority for port
    5000 only."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir=short_folder))
    certs = folder / "etc" / "certs.d" / f"{DOCUMENTATION_ADDRESS}:5000"
    certs.mkdir(parents=True)
    (certs / "ca.crt").write_text(Path(tls_server.authority).read_text())
    with (
        cutting_proxy(tls_server.address, tunnel=True) as proxy,
        running_docker(folder, etc=folder / "etc", proxy=f"http://{proxy.address}") as running,
    ):
        yield running
        assert f"CONNECT {DOCUMENTATION_ADDRESS}:5000" in proxy.request_lines


def log_in(docker: DockerEngine, address: str, login: ClientLogin) -> tuple[int, str]:
    result = docker.call.attempt("login", address, "-u", login.name, "--password-stdin", stdin_text=login.secret)
    return result.code, result.text


def test_docker(far_docker: DockerEngine, repo: str, small_image: ClientImage, tmp_path: Path) -> None:
    """With the authority's certificate in certs.d, docker can log in, push and pull. Requests without the right or with
    a wrong password are refused. Without the authority's certificate, docker's error is an unknown authority."""
    my_docker, name, public_image = (
        logged_out(far_docker, tmp_path),
        f"{DOCUMENTATION_ADDRESS}:5000/{repo}:1",
        f"{DOCUMENTATION_ADDRESS}:5000/team/open/docker:1",
    )
    code, output = log_in(my_docker, f"{DOCUMENTATION_ADDRESS}:5001", ALICE)
    assert (code, "certificate signed by unknown authority" in output) == (1, True), output
    code, output = log_in(my_docker, f"{DOCUMENTATION_ADDRESS}:5000", ClientLogin("alice", WRONG))
    assert (code, "unauthorized: the credentials are not valid" in output) == (1, True), output
    assert log_in(my_docker, f"{DOCUMENTATION_ADDRESS}:5000", ALICE)[0] == 0
    for each in (name, public_image):
        my_docker.load(small_image, each)
        my_docker("push", each)
    my_docker.remove_image(name)
    my_docker("pull", name)
    assert my_docker.output_of(name) == f"hello from {repo}\n"
    my_docker.remove_image(name)
    my_docker("logout", f"{DOCUMENTATION_ADDRESS}:5000")
    my_docker("pull", public_image)
    assert f"unauthorized: log in to pull from {repo}" in my_docker.call.attempt("pull", name).err
    assert log_in(my_docker, f"{DOCUMENTATION_ADDRESS}:5000", EVE)[0] == 0
    assert f"denied: eve may not push to {repo}" in _push(my_docker, small_image, name)
    my_docker.remove_image(public_image)


def test_docker_search(far_docker: DockerEngine, repo: str, small_image: ClientImage, tmp_path: Path) -> None:
    """Over TLS, docker sends its login with a search, and finds the repositories from which this login may pull.
    Without a login, it finds those from which everyone may pull."""
    my_docker, term = logged_out(far_docker, tmp_path), repo.removeprefix("team/")
    public_image = f"team/open/{term}"

    def found() -> set[str]:
        return set(my_docker("search", "--format", "{{.Name}}", f"{DOCUMENTATION_ADDRESS}:5000/{term}").out.split())

    assert log_in(my_docker, f"{DOCUMENTATION_ADDRESS}:5000", ALICE)[0] == 0
    for name in (repo, public_image):
        my_docker.load(small_image, f"{DOCUMENTATION_ADDRESS}:5000/{name}:1")
        my_docker("push", f"{DOCUMENTATION_ADDRESS}:5000/{name}:1")
    wait_until(lambda: found() == {repo, public_image}, 60, lambda: f"docker finds {found()}")
    my_docker("logout", f"{DOCUMENTATION_ADDRESS}:5000")
    assert found() == {public_image}
    assert log_in(my_docker, f"{DOCUMENTATION_ADDRESS}:5000", EVE)[0] == 0
    assert found() == {public_image}
    my_docker.remove_image(f"{DOCUMENTATION_ADDRESS}:5000/{repo}:1")


def _push(docker: DockerEngine, image: ClientImage, name: str) -> str:
    docker.load(image, name)
    return docker.call.attempt("push", name).err


def test_podman_and_skopeo(
    tools: ContainerTools, tls_server: TlsServer, repo: str, small_image: ClientImage, tmp_path: Path
) -> None:
    """With `--cert-dir`, podman and skopeo can log in, push and pull, and get the registry's errors. Without it, the
    TLS handshake fails."""
    my_tools, cert, name = tools_logged_out(tools, tmp_path), str(tls_server.trusted), f"{tls_server.address}/{repo}:1"
    loaded(my_tools, small_image, name, tmp_path / "in")
    login = ("login", "-u", ALICE.name, "--password-stdin", tls_server.address)
    assert "unknown authority" in my_tools.podman.attempt(*login, stdin_text=ALICE.secret).err
    refused_login = my_tools.podman.attempt(*login, "--cert-dir", cert, stdin_text=WRONG)
    assert "invalid username/password" in refused_login.err
    my_tools.podman(*login, "--cert-dir", cert, stdin_text=ALICE.secret)
    my_tools.podman("push", "--cert-dir", cert, name)
    public_image = f"docker://{tls_server.address}/team/open/podman:1"
    cert_dirs = ("--src-cert-dir", cert, "--dest-cert-dir", cert)
    my_tools.skopeo("copy", "--quiet", *cert_dirs, f"docker://{name}", public_image)
    my_tools.podman("rmi", "--force", my_tools.image_id(name))
    my_tools.podman("pull", "--cert-dir", cert, name)
    assert my_tools.output_of(name) == f"hello from {repo}\n"
    my_tools.podman("logout", tls_server.address)
    assert json.loads(my_tools.skopeo("inspect", "--cert-dir", cert, public_image).out)["Architecture"] == "amd64"
    assert "log in to pull" in my_tools.skopeo.attempt("inspect", "--cert-dir", cert, f"docker://{name}").err
    eve = ("--creds", f"{EVE.name}:{EVE.secret}")
    assert f"denied: eve may not push to {repo}" in my_tools.podman.attempt("push", "--cert-dir", cert, *eve, name).err


def test_podman_search(
    tools: ContainerTools, tls_server: TlsServer, repo: str, small_image: ClientImage, tmp_path: Path
) -> None:
    """Without a login, podman finds the repositories from which everyone may pull. With a login, it also finds those
    from which the login may pull. Without the authority's certificate, the TLS handshake fails. `podman search` has no
    `--cert-dir`, so the test sets SSL_CERT_FILE."""
    my_tools = tools_logged_out(tools, tmp_path)
    podman, cert = my_tools.podman.with_variables(SSL_CERT_FILE=tls_server.authority), str(tls_server.trusted)
    public_image, term = f"team/open/{repo.removeprefix('team/')}", f"{tls_server.address}/{repo.removeprefix('team/')}"
    loaded(my_tools, small_image, f"{tls_server.address}/{repo}", tmp_path / "in")
    login = ("--creds", f"{ALICE.name}:{ALICE.secret}")
    for name in (repo, public_image):
        source, target = f"{tls_server.address}/{repo}", f"docker://{tls_server.address}/{name}:1"
        my_tools.podman("push", "--quiet", "--cert-dir", cert, *login, source, target)

    def found(term: str) -> list[str]:
        entries = json.loads(podman.attempt("search", "--format", "json", term).out or "[]")
        return [entry["Name"].removeprefix(f"{tls_server.address}/") for entry in entries]

    assert "unknown authority" in my_tools.podman.attempt("search", term).err
    wait_until(lambda: found(term) == [public_image], 60, lambda: f"podman finds {found(term)}")
    private_term = f"{tls_server.address}/{repo}"
    assert found(private_term) == []
    podman("login", "-u", ALICE.name, "--password-stdin", tls_server.address, stdin_text=ALICE.secret)
    assert found(private_term) == [repo]


def test_containerd(
    ctr: Containerd, tls_server: TlsServer, repo: str, small_image: ClientImage, tmp_path: Path
) -> None:
    """With `ca` in hosts.toml, containerd can push and pull, and gets the registry's errors. Without it, the TLS
    handshake fails."""
    host, name = f'[host."https://{tls_server.address}"]\n', f"{tls_server.address}/{repo}:1"
    without_ca, with_ca = (
        _hosts(tmp_path / which, tls_server.address, lines)
        for which, lines in {"without_ca": host, "with_ca": f'{host}ca = "{tls_server.authority}"\n'}.items()
    )
    alice, eve = (("--user", f"{login.name}:{login.secret}") for login in (ALICE, EVE))
    ctr.load(small_image, f"localhost/{repo}:1", tmp_path / "in")
    push, pull = ("images", "push"), ("images", "pull", "--snapshotter", "native")
    assert "unknown authority" in ctr.call.attempt(*push, *without_ca, *alice, name, f"localhost/{repo}:1").err
    ctr(*push, *with_ca, *alice, name, f"localhost/{repo}:1")
    ctr.forget(f"localhost/{repo}:1")
    assert "401 Unauthorized" in ctr.call.attempt(*pull, *with_ca, name).err
    assert "http.StatusNotFound" in ctr.call.attempt(*pull, *with_ca, *eve, name).err
    ctr(*pull, *with_ca, *alice, name)
    assert ctr.has_same_bytes(small_image)
    assert "403 Forbidden" in ctr.call.attempt(*push, *with_ca, *eve, f"{tls_server.address}/{repo}:2", name).err
    ctr.forget(name)


def _hosts(folder: Path, host: str, lines: str) -> tuple[str, str]:
    (folder / host).mkdir(parents=True)
    (folder / host / "hosts.toml").write_text(lines)
    return "--hosts-dir", str(folder)


def test_curl_and_skopeo_by_an_identity_token(
    tools: ContainerTools, tls_server: TlsServer, repo: str, tmp_path: Path
) -> None:
    """curl sends a password to the registry itself, and gets a refresh token from the token endpoint. skopeo can use
    this token as its login. The realm of the challenge begins with https."""
    curl = ForeignProgram(("curl", "--silent", "--show-error", "--cacert", tls_server.authority), {"PATH": PATH})
    root = f"https://{tls_server.address}"
    assert f'realm="{root}/token"' in curl("--include", f"{root}/v2/").out
    assert curl("--user", f"{ALICE.name}:{ALICE.secret}", f"{root}/v2/").out == "{}"
    form = {"grant_type": "password", "service": "entrepot", "client_id": "curl", "access_type": "offline"}
    form |= {"username": ALICE.name, "password": ALICE.secret}
    fields = [word for name, value in form.items() for word in ("--data-urlencode", f"{name}={value}")]
    refresh = json.loads(curl(*fields, f"{root}/token").out)["refresh_token"]
    my_tools = tools_logged_out(tools, tmp_path)
    stored_logins = {tls_server.address: {"auth": ClientLogin(ALICE.name, "").encoded, "identitytoken": refresh}}
    Path(my_tools.skopeo.env["REGISTRY_AUTH_FILE"]).write_text(json.dumps({"auths": stored_logins}))
    missing = my_tools.skopeo.attempt(
        "list-tags", "--cert-dir", str(tls_server.trusted), f"docker://{tls_server.address}/{repo}"
    )
    assert "404" in missing.err  # the login is accepted; only the repository does not exist
