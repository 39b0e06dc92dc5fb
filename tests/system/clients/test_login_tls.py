"""Real clients that log in over TLS, with an authority of the tests."""

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

FAR = "192.0.2.10"
"""docker trusts whatever is on this machine, whoever has signed for it. So it comes by a proxy to an address for
documents (RFC 5737)."""
ALICE, EVE = ClientLogin("alice", "a password of alice"), ClientLogin("eve", "a password of eve's own")


@dataclass(frozen=True)
class TlsServer:
    """A server with TLS. `trusted`: a folder with ca.crt, as docker's certs.d has for each registry."""

    server: RegistryServer
    trusted: Path

    @property
    def address(self) -> str:
        return self.server.address

    @property
    def authority(self) -> str:
        return str(self.trusted / "ca.crt")


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    """alice may push below `team`, everyone may pull below `team/open`, and eve has an account without grants."""
    folder = tmp_path_factory.mktemp("secret")
    authority = CertificateAuthority(folder)
    pair, trusted = authority.sign("localhost", also=FAR), folder / "trusted"
    trusted.mkdir()
    (trusted / "ca.crt").write_bytes(authority.certificate.read_bytes())
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, given=PASSWORD)
    for login in (ALICE, EVE):
        entrepot_output("user", "add", login.name, "--password-file", "-", folder=folder, given=login.secret)
    entrepot_output("grant", "add", "team/**", "pull,push", "user:alice", folder=folder)
    entrepot_output("grant", "add", "team/open/**", "pull", "everyone", folder=folder)
    variables = {"ENTREPOT_TLS__CERTIFICATE": str(pair.certificate), "ENTREPOT_TLS__KEY": str(pair.key)}
    with running_server(folder, env=variables) as running:
        yield TlsServer(running, trusted)


@pytest.fixture(scope="module")
def far_docker(secret: TlsServer, short_folder: Path) -> Iterator[DockerEngine]:
    """A dockerd that connects to the registry as FAR. It has the registry's authority for port 5000 only."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir=short_folder))
    certs = folder / "etc" / "certs.d" / f"{FAR}:5000"
    certs.mkdir(parents=True)
    (certs / "ca.crt").write_text(Path(secret.authority).read_text())
    with (
        cutting_proxy(secret.address, tunnel=True) as way,
        running_docker(folder, etc=folder / "etc", proxy=f"http://{way.address}") as running,
    ):
        yield running
        assert f"CONNECT {FAR}:5000" in way.asked


def log_in(docker: DockerEngine, address: str, login: ClientLogin) -> tuple[int, str]:
    done = docker.call.attempt("login", address, "-u", login.name, "--password-stdin", given=login.secret)
    return done.code, done.text


def test_docker(far_docker: DockerEngine, repo: str, fresh: ClientImage, tmp_path: Path) -> None:
    """With certs.d, docker logs in, pushes, is refused, and pulls without a login. Without the authority's certificate,
    it says that the authority is unknown."""
    me, name, opened = logged_out(far_docker, tmp_path), f"{FAR}:5000/{repo}:1", f"{FAR}:5000/team/open/docker:1"
    code, said = log_in(me, f"{FAR}:5001", ALICE)
    assert (code, "certificate signed by unknown authority" in said) == (1, True), said
    code, said = log_in(me, f"{FAR}:5000", ClientLogin("alice", WRONG))
    assert (code, "unauthorized: the credentials are not valid" in said) == (1, True), said
    assert log_in(me, f"{FAR}:5000", ALICE)[0] == 0
    for each in (name, opened):
        me.load(fresh, each)
        me("push", each)
    me.forget(name)
    me("pull", name)
    assert me.output_of(name) == f"hello from {repo}\n"
    me.forget(name)
    me("logout", f"{FAR}:5000")
    me("pull", opened)
    assert f"unauthorized: log in to pull from {repo}" in me.call.attempt("pull", name).err
    assert log_in(me, f"{FAR}:5000", EVE)[0] == 0
    assert f"denied: eve may not push to {repo}" in _push(me, fresh, name)
    me.forget(opened)


def test_docker_search(far_docker: DockerEngine, repo: str, fresh: ClientImage, tmp_path: Path) -> None:
    """Over TLS, docker sends the login itself with a search. It finds what this login may pull; without a login it
    finds what everyone may pull."""
    me, term = logged_out(far_docker, tmp_path), repo.removeprefix("team/")
    opened = f"team/open/{term}"

    def found() -> set[str]:
        return set(me("search", "--format", "{{.Name}}", f"{FAR}:5000/{term}").out.split())

    assert log_in(me, f"{FAR}:5000", ALICE)[0] == 0
    for name in (repo, opened):
        me.load(fresh, f"{FAR}:5000/{name}:1")
        me("push", f"{FAR}:5000/{name}:1")
    wait_until(lambda: found() == {repo, opened}, 60, lambda: f"docker finds {found()}")
    me("logout", f"{FAR}:5000")
    assert found() == {opened}
    assert log_in(me, f"{FAR}:5000", EVE)[0] == 0
    assert found() == {opened}
    me.forget(f"{FAR}:5000/{repo}:1")


def _push(docker: DockerEngine, image: ClientImage, name: str) -> str:
    docker.load(image, name)
    return docker.call.attempt("push", name).err


def test_podman_and_skopeo(
    tools: ContainerTools, secret: TlsServer, repo: str, fresh: ClientImage, tmp_path: Path
) -> None:
    """With `--cert-dir`, podman and skopeo log in, push, pull and are refused. Without it, the TLS handshake fails."""
    mine, cert, name = tools_logged_out(tools, tmp_path), str(secret.trusted), f"{secret.address}/{repo}:1"
    loaded(mine, fresh, name, tmp_path / "in")
    login = ("login", "-u", ALICE.name, "--password-stdin", secret.address)
    assert "unknown authority" in mine.podman.attempt(*login, given=ALICE.secret).err
    wrong = mine.podman.attempt(*login, "--cert-dir", cert, given=WRONG)
    assert "invalid username/password" in wrong.err
    mine.podman(*login, "--cert-dir", cert, given=ALICE.secret)
    mine.podman("push", "--cert-dir", cert, name)
    opened = f"docker://{secret.address}/team/open/podman:1"
    both = ("--src-cert-dir", cert, "--dest-cert-dir", cert)
    mine.skopeo("copy", "--quiet", *both, f"docker://{name}", opened)
    mine.podman("rmi", "--force", mine.image_id(name))
    mine.podman("pull", "--cert-dir", cert, name)
    assert mine.output_of(name) == f"hello from {repo}\n"
    mine.podman("logout", secret.address)
    assert json.loads(mine.skopeo("inspect", "--cert-dir", cert, opened).out)["Architecture"] == "amd64"
    assert "log in to pull" in mine.skopeo.attempt("inspect", "--cert-dir", cert, f"docker://{name}").err
    eve = ("--creds", f"{EVE.name}:{EVE.secret}")
    assert f"denied: eve may not push to {repo}" in mine.podman.attempt("push", "--cert-dir", cert, *eve, name).err


def test_podman_search(tools: ContainerTools, secret: TlsServer, repo: str, fresh: ClientImage, tmp_path: Path) -> None:
    """podman finds what everyone may pull, and with a login what the login may pull. It knows the authority from the
    system's store, because a search takes no `--cert-dir`; without the authority it goes no further than the
    handshake."""
    strange = tools_logged_out(tools, tmp_path)
    podman, cert = strange.podman.with_variables(SSL_CERT_FILE=secret.authority), str(secret.trusted)
    opened, term = f"team/open/{repo.removeprefix('team/')}", f"{secret.address}/{repo.removeprefix('team/')}"
    loaded(strange, fresh, f"{secret.address}/{repo}", tmp_path / "in")
    login = ("--creds", f"{ALICE.name}:{ALICE.secret}")
    for name in (repo, opened):
        source, target = f"{secret.address}/{repo}", f"docker://{secret.address}/{name}:1"
        strange.podman("push", "--quiet", "--cert-dir", cert, *login, source, target)

    def found(term: str) -> list[str]:
        entries = json.loads(podman.attempt("search", "--format", "json", term).out or "[]")
        return [entry["Name"].removeprefix(f"{secret.address}/") for entry in entries]

    assert "unknown authority" in strange.podman.attempt("search", term).err
    wait_until(lambda: found(term) == [opened], 60, lambda: f"podman finds {found(term)}")
    hidden = f"{secret.address}/{repo}"
    assert found(hidden) == []
    podman("login", "-u", ALICE.name, "--password-stdin", secret.address, given=ALICE.secret)
    assert found(hidden) == [repo]


def test_containerd(ctr: Containerd, secret: TlsServer, repo: str, fresh: ClientImage, tmp_path: Path) -> None:
    """With `ca` in hosts.toml, containerd pushes, pulls and is refused."""
    host, name = f'[host."https://{secret.address}"]\n', f"{secret.address}/{repo}:1"
    strange, trusting = (
        _hosts(tmp_path / which, secret.address, lines)
        for which, lines in {"strange": host, "trusting": f'{host}ca = "{secret.authority}"\n'}.items()
    )
    alice, eve = (("--user", f"{login.name}:{login.secret}") for login in (ALICE, EVE))
    ctr.load(fresh, f"localhost/{repo}:1", tmp_path / "in")
    push, pull = ("images", "push"), ("images", "pull", "--snapshotter", "native")
    assert "unknown authority" in ctr.call.attempt(*push, *strange, *alice, name, f"localhost/{repo}:1").err
    ctr(*push, *trusting, *alice, name, f"localhost/{repo}:1")
    ctr.forget(f"localhost/{repo}:1")
    assert "401 Unauthorized" in ctr.call.attempt(*pull, *trusting, name).err
    assert "http.StatusNotFound" in ctr.call.attempt(*pull, *trusting, *eve, name).err
    ctr(*pull, *trusting, *alice, name)
    assert ctr.has_same_bytes(fresh)
    assert "403 Forbidden" in ctr.call.attempt(*push, *trusting, *eve, f"{secret.address}/{repo}:2", name).err
    ctr.forget(name)


def _hosts(folder: Path, host: str, lines: str) -> tuple[str, str]:
    (folder / host).mkdir(parents=True)
    (folder / host / "hosts.toml").write_text(lines)
    return "--hosts-dir", str(folder)


def test_curl_and_skopeo_by_an_identity_token(
    tools: ContainerTools, secret: TlsServer, repo: str, tmp_path: Path
) -> None:
    """curl logs in with a password at the registry itself, and gets a refresh token with which skopeo logs in. The
    realm of the challenge begins with https."""
    curl = ForeignProgram(("curl", "--silent", "--show-error", "--cacert", secret.authority), {"PATH": PATH})
    root = f"https://{secret.address}"
    assert f'realm="{root}/token"' in curl("--include", f"{root}/v2/").out
    assert curl("--user", f"{ALICE.name}:{ALICE.secret}", f"{root}/v2/").out == "{}"
    form = {"grant_type": "password", "service": "entrepot", "client_id": "curl", "access_type": "offline"}
    form |= {"username": ALICE.name, "password": ALICE.secret}
    fields = [word for name, value in form.items() for word in ("--data-urlencode", f"{name}={value}")]
    refresh = json.loads(curl(*fields, f"{root}/token").out)["refresh_token"]
    mine = tools_logged_out(tools, tmp_path)
    kept = {secret.address: {"auth": ClientLogin(ALICE.name, "").encoded, "identitytoken": refresh}}
    Path(mine.skopeo.env["REGISTRY_AUTH_FILE"]).write_text(json.dumps({"auths": kept}))
    missing = mine.skopeo.attempt("list-tags", "--cert-dir", str(secret.trusted), f"docker://{secret.address}/{repo}")
    assert "404" in missing.err
