"""Tests of the container image, docker-compose.yml and the systemd units, with a real dockerd that can reach only this
machine.

The base image is a minimal Debian with Python. dockerd uses an Entrepot as its mirror of Docker Hub. The tests push the
base image to it as `library/python`, so the Dockerfile can be built without changes. Everything runs in a separate
network namespace, where the published ports are free and dockerd may change the firewall.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from registry import __version__
from tests.fakes.certificate_authority import CertificateAuthority
from tests.fakes.client_images import ClientImage, image
from tests.fakes.clients.docker_engine import DockerEngine, running_docker
from tests.fakes.clients.programs import wait_until
from tests.fakes.compose_project import ComposeProject, compose_project
from tests.fakes.deployment.book_commands import book_command, shown_file
from tests.fakes.deployment.debian_tree import DebianTree, make_debian_tree, unpack_package
from tests.fakes.own_network import own_network
from tests.fakes.package_index import download_packages, package_index
from tests.fakes.server_process import ROOT, RegistryServer, running_server
from tests.fakes.temporary_files import system_folder

NGINX = "172.30.53.11"
"""The address of the nginx container in docker-compose.yml."""
PASSWORD = "correct horse battery"
HARDENING_OPTIONS = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
HEALTH_EVERY_SECOND = ("--health-interval", "1s")
DEADLINE_SECONDS = 60.0
PROMETHEUS_DOCKERFILE = """
FROM machine
COPY prometheus /bin/prometheus
ENTRYPOINT ["/bin/prometheus"]
"""
BACKUP_FOLDER = """
services:
  entrepot:
    volumes:
      - {folder}:/backup
"""
MACHINE_DOCKERFILE = """
FROM machine
RUN rm -f /lib/systemd/system/*.target.wants/* /etc/systemd/system/*.target.wants/*
COPY --from=entrepot:latest /opt/entrepot /opt/entrepot
COPY . /etc/systemd/system/
CMD ["/lib/systemd/systemd"]
"""
"""Builds an image of a machine with systemd and Entrepot. Removes all other units, because they could change settings
of the real machine."""
SYSTEMD_OPTIONS = (
    *("--network", "host", "--tmpfs", "/run", "--tmpfs", "/tmp", "--volume", "/sys/fs/cgroup:/sys/fs/cgroup"),
    *("--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined", "--env", "container=docker"),
)

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with system_folder() as created:
        yield created


@pytest.fixture(scope="module")
def python_tree(folder: Path) -> DebianTree:
    """Returns a Debian system that takes the place of the image `python:3.11-slim`."""
    return make_debian_tree(folder / "python", "ca-certificates", "python-is-python3", "python3", "python3-venv")


@pytest.fixture(scope="module")
def programs_tree(python_tree: DebianTree, folder: Path) -> DebianTree:
    """Returns a Debian system that takes the place of the image of nginx, and of a machine with systemd."""
    tree = python_tree.copy(folder / "programs")
    tree.install("dbus", "nginx-light", "ssl-cert", "systemd")
    tree.run("nginx", "-t", "-q")  # creates the folders that nginx needs
    for name in ("access", "error"):
        log = tree.folder / "var" / "log" / "nginx" / f"{name}.log"
        log.unlink(missing_ok=True)
        log.symlink_to("/dev/stderr")
    return tree


@pytest.fixture(scope="module")
def packages(python_tree: DebianTree, folder: Path) -> Path:
    """Downloads the packages of the lock files for the Python version of the base image, and returns their folder."""
    version = python_tree.run("python", "-c", "import sys; print(*sys.version_info[:2], sep='.')").strip()
    target = folder / "packages"
    download_packages(target, version, ROOT / "requirements" / "build.txt", ROOT / "requirements" / "runtime.txt")
    return target


@pytest.fixture(scope="module")
def compose_2(folder: Path) -> Path:
    """Returns the path of Debian 13's program docker-compose, version 2."""
    return unpack_package(folder / "compose", "docker-compose", "trixie") / "usr" / "bin" / "docker-compose"


@pytest.fixture(scope="module")
def network(python_tree: DebianTree, programs_tree: DebianTree, packages: Path, compose_2: Path) -> Iterator[None]:
    """Moves the tests into a separate network namespace. All files that have to be downloaded are requested as
    fixtures, because they cannot be downloaded afterwards."""
    with own_network():
        yield


@pytest.fixture(scope="module")
def mirror(network: None, folder: Path) -> Iterator[RegistryServer]:
    with running_server(folder / "mirror", own_interpreter=True) as running:
        yield running


@pytest.fixture(scope="module")
def authority(folder: Path) -> CertificateAuthority:
    return CertificateAuthority(folder)


@pytest.fixture(scope="module")
def docker(mirror: RegistryServer, authority: CertificateAuthority, folder: Path) -> Iterator[DockerEngine]:
    """Runs a dockerd that uses the mirror, and that trusts the certificate of nginx."""
    trusted = folder / "etc" / "certs.d" / NGINX
    trusted.mkdir(parents=True)
    shutil.copy(authority.certificate, trusted / "ca.crt")
    (folder / "docker").mkdir()
    options = ("--registry-mirror", mirror.url, "--storage-driver", "overlay2")
    with running_docker(folder / "docker", *options, etc=folder / "etc", networks=True) as running:
        yield running


@pytest.fixture(scope="module")
def built(docker: DockerEngine, mirror: RegistryServer, python_tree: DebianTree, packages: Path, folder: Path) -> str:
    """Builds the container image with files of this machine only, and returns its name."""
    base = f"{mirror.address}/library/python:3.11-slim"
    archive = python_tree.write_archive(folder / "python.tar")
    docker("import", str(archive), base)
    docker("push", base)
    docker.remove_image(base)
    name = "entrepot:latest"
    with package_index(packages) as index:
        values = {"PIP_INDEX_URL": index, "VERSION": __version__, "REVISION": "0123abc"}
        arguments = [word for key, value in values.items() for word in ("--build-arg", f"{key}={value}")]
        command = book_command("deployment", "docker build", ("deploy/", f"{ROOT}/deploy/"), (" .", f" {ROOT}"))
        _, build, *words = shlex.split(command)
        docker(build, "--pull", "--network", "host", *arguments, *words, timeout=1200)
    return name


@pytest.fixture
def hello() -> ClientImage:
    return image("hello from a container")


def push_and_pull(docker: DockerEngine, name: str, pushed: ClientImage) -> None:
    docker.load(pushed, name)
    docker("push", name)
    pull_again(docker, name)


def pull_again(docker: DockerEngine, name: str) -> None:
    docker.remove_image(name)
    docker("pull", name)
    assert docker.output_of(name) == "hello from a container\n"


def published(docker: DockerEngine, container: str, port: int) -> str:
    """Returns the address on this machine at which docker publishes a port of the container."""
    return docker("port", container, str(port)).out.split()[0]


def in_image(docker: DockerEngine, name: str, program: str, *args: str) -> str:
    """Runs a program as root in a new container of the image, and returns its output."""
    return docker("run", "--rm", "--user", "0", "--entrypoint", program, name, *args).out


def health(docker: DockerEngine, container: str) -> str:
    return docker("inspect", "--format", "{{.State.Health.Status}}", container).out.strip()


def wait_for_health(docker: DockerEngine, container: str) -> None:
    wait_until(lambda: health(docker, container) == "healthy", DEADLINE_SECONDS, lambda: docker("logs", container).text)


def test_the_image_has_labels_and_a_user(docker: DockerEngine, built: str) -> None:
    """The image has the labels of the OCI image spec, runs as a user other than root, and has the version of this
    repository."""
    config = docker.inspect(built)["Config"]
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items()}
    assert labels["title"] == "Entrepot"
    assert (labels["licenses"], labels["version"], labels["revision"]) == ("Apache-2.0", __version__, "0123abc")
    assert config["User"] == "10001:10001"
    assert docker("run", "--rm", built, "--version").out.split()[-1] == __version__


def test_the_image_has_only_what_it_needs(docker: DockerEngine, built: str) -> None:
    """The image has no pip, no compiler, no build tools and no setuid programs. All modules that the server imports are
    compiled to bytecode. The image is less than 1.5 times as large as its base image."""
    names = " -o ".join(f"-name {name}" for name in ("pip", "pip-*", "ensurepip", "setuptools", "hatchling", "wheel"))
    assert in_image(docker, built, "sh", "-fc", f"find / -xdev {names}") == ""
    assert in_image(docker, built, "sh", "-c", "command -v pip pip3 gcc cc c++ make || true") == ""
    assert in_image(docker, built, "find", "/", "-xdev", "-type", "f", "-perm", "/6000") == ""
    modules = "import registry.app, registry.cli.command, registry.cli.serve_command"
    verbose = docker("run", "--rm", "--entrypoint", "python", built, "-v", "-c", modules).err
    assert re.findall(r"^# code object from '(\S+\.py)'", verbose, re.MULTILINE) == []
    assert docker.inspect(built)["Size"] < 1.5 * docker.inspect("python:3.11-slim")["Size"]


def test_the_container_runs_with_a_read_only_root(docker: DockerEngine, built: str, hello: ClientImage) -> None:
    """With a read-only root file system and without capabilities, the container becomes healthy and accepts a push. The
    pushed content survives a restart. SIGTERM ends the container with exit code 0."""
    options = ("--publish", "127.0.0.1::5000", "--env", "ENTREPOT_INSECURE_OPEN=true", *HEALTH_EVERY_SECOND)
    container = docker("run", "--detach", *HARDENING_OPTIONS, *options, built).out.strip()
    wait_for_health(docker, container)
    push_and_pull(docker, f"{published(docker, container, 5000)}/team/hello:1", hello)
    docker.remove_image(f"{published(docker, container, 5000)}/team/hello:1")
    docker("restart", container)
    wait_for_health(docker, container)
    name = f"{published(docker, container, 5000)}/team/hello:1"
    docker("pull", name)
    assert docker.output_of(name) == "hello from a container\n"
    docker("stop", container)
    assert docker("inspect", "--format", "{{.State.ExitCode}}", container).out == "0\n"
    docker("rm", "--volumes", container)


def test_the_container_requires_an_account(docker: DockerEngine, built: str) -> None:
    """Without accounts, the container does not start, and its error says how to add an account. The commands of the
    page deployment add one and start it."""
    volume = ("--volume", "entrepot-data:/var/lib/entrepot")
    refused = docker.call.attempt("run", "--rm", *HARDENING_OPTIONS, *volume, built)
    assert refused.code != 0
    assert "entrepot user add NAME --admin" in refused.err
    add = shlex.split(book_command("deployment", "docker run --rm", ("-it", "-i")))
    docker.call(*add[1:], "--password-file", "-", stdin_text=PASSWORD)
    *run, name = shlex.split(book_command("deployment", "docker run -d"))
    container = docker(*run[1:], *HEALTH_EVERY_SECOND, name).out.strip()
    wait_for_health(docker, container)
    assert published(docker, container, 5000) == "127.0.0.1:5000"
    docker("rm", "--force", container)
    docker("volume", "rm", "entrepot-data")


@pytest.fixture
def compose(docker: DockerEngine, built: str, compose_2: Path) -> Iterator[ComposeProject]:
    """Runs docker-compose.yml with compose 2, the current version."""
    with started_project(docker, str(compose_2)) as project:
        yield project


@pytest.fixture(params=["of this Debian", "2"])
def any_compose(
    request: pytest.FixtureRequest, docker: DockerEngine, built: str, compose_2: Path
) -> Iterator[ComposeProject]:
    """Runs docker-compose.yml with the compose of this Debian release (1.29 on Debian 12), and with compose 2."""
    with started_project(docker, str(compose_2) if request.param == "2" else "docker-compose") as project:
        yield project


@contextmanager
def started_project(docker: DockerEngine, program: str, *overrides: Path) -> Iterator[ComposeProject]:
    """Runs the registry of docker-compose.yml, without the services of its profiles, until the block ends. Then removes
    all containers and volumes."""
    project = compose_project(docker, program, *overrides)
    remove = book_command("deployment", "docker compose --profile tls --profile monitoring down", ("down", "down -v"))
    try:
        project.run(book_command("deployment", "docker compose up"))
        wait_for_server(project)
        yield project
    finally:
        project.run(remove)


@pytest.fixture(scope="module")
def machine_image(docker: DockerEngine, programs_tree: DebianTree, folder: Path) -> str:
    archive = programs_tree.write_archive(folder / "programs.tar")
    docker("import", str(archive), "machine")
    return "machine"


@pytest.fixture(scope="module")
def other_images(docker: DockerEngine, machine_image: str, folder: Path) -> None:
    """Makes images of nginx and Prometheus under the names that docker-compose.yml uses."""
    text = (ROOT / "docker-compose.yml").read_text()
    (nginx,) = re.findall(r"image: (nginx:\S+)", text)
    (prometheus,) = re.findall(r"image: (prom/prometheus:\S+)", text)
    docker("tag", machine_image, nginx)
    program = shutil.which("prometheus")
    assert program
    (folder / "prometheus").mkdir()
    shutil.copy(program, folder / "prometheus" / "prometheus")
    (folder / "prometheus" / "Dockerfile").write_text(PROMETHEUS_DOCKERFILE)
    docker("build", "--tag", prometheus, str(folder / "prometheus"))


def test_compose(docker: DockerEngine, any_compose: ComposeProject, hello: ClientImage) -> None:
    """`up` runs a registry that mirrors Docker Hub, and publishes it only on the loopback address. The content of a
    push is still there in a new container. Commands in the container reach the running server."""
    compose = any_compose
    assert published(docker, compose.container("entrepot"), 5000) == "127.0.0.1:5000"
    name = "127.0.0.1:5000/team/hello:1"
    push_and_pull(docker, name, hello)
    settings = compose("exec", "-T", "entrepot", "entrepot", "config", "--format", "toml").out
    assert re.search(r'^name = "docker\.io"$', settings, re.MULTILINE)
    compose("up", "--detach", "--force-recreate")
    wait_for_server(compose)
    pull_again(docker, name)
    no_terminal = ("exec", "exec -T")
    status = book_command("deployment", "docker compose exec entrepot entrepot status", no_terminal)
    assert f"entrepot {__version__} runs for" in compose.run(status).out
    compose.run(book_command("deployment", "docker compose exec entrepot entrepot reload", no_terminal))
    log = compose.run(book_command("deployment", "docker compose logs", (" --follow", ""))).out
    assert "HEAD /v2/team/hello/manifests/1" in log  # the pull by the name


def test_backup_with_compose(docker: DockerEngine, built: str, compose_2: Path, folder: Path) -> None:
    """A folder that docker-compose.override.yml mounts gets the backup."""
    backup = folder / "backup"
    backup.mkdir()
    shutil.chown(backup, 10001, 10001)
    override = folder / "docker-compose.override.yml"
    override.write_text(BACKUP_FOLDER.format(folder=backup))
    with started_project(docker, str(compose_2), override) as project:
        project.run(book_command("deployment", "docker compose exec entrepot entrepot backup", ("exec", "exec -T")))
        assert list(backup.rglob("*.db*"))


def test_compose_with_nginx(
    docker: DockerEngine,
    compose: ComposeProject,
    other_images: None,
    authority: CertificateAuthority,
    folder: Path,
    hello: ClientImage,
) -> None:
    """After the steps at the top of docker-compose.yml, docker can log in, push and pull through nginx with TLS.
    Without a login, a pull fails. The registry logs the address of the client, not that of nginx."""
    add = book_command("deployment", "docker compose exec entrepot entrepot user add", ("exec", "exec -T"))
    compose.run(f"{add} --password-file -", stdin_text=PASSWORD)
    pair = authority.sign("nginx", also=NGINX)
    (folder / "tls").mkdir()
    shutil.copy(pair.certificate, folder / "tls" / "fullchain.pem")
    shutil.copy(pair.key, folder / "tls" / "privkey.pem")
    compose.set_variables(
        book_command("deployment", "ENTREPOT_PUBLIC_URL", ("registry.example.com", NGINX)),
        book_command("deployment", "ENTREPOT_INSECURE_OPEN"),
        book_command("deployment", "ENTREPOT_PUBLISH_TLS"),
        f"ENTREPOT_TLS_FOLDER={folder / 'tls'}",
    )
    compose.run(book_command("deployment", "docker compose --profile tls up"))
    assert published(docker, compose.container("nginx"), 443) == "0.0.0.0:443"
    name = f"{NGINX}/team/hello:1"
    docker.load(hello, name)
    login = shlex.split(book_command("deployment", "docker login", ("registry.example.com", NGINX)))
    wait_until(
        lambda: docker.call.attempt(*login[1:], "--username", "alice", "--password", PASSWORD).code == 0,
        DEADLINE_SECONDS,
        lambda: compose("logs").out,
    )
    docker("push", name)
    pull_again(docker, name)
    docker("logout", NGINX)
    docker.remove_image(name)
    assert docker.call.attempt("pull", name).code != 0
    log = compose("logs", "entrepot").out
    addresses = re.findall(r"PUT /v2/team/hello/manifests/1 .* address=(\S+)", log)
    assert addresses
    assert NGINX not in addresses


def test_compose_with_prometheus(compose: ComposeProject, other_images: None) -> None:
    """The Prometheus of docker-compose.yml scrapes the metrics of the registry."""
    up = book_command("deployment", "docker compose --profile monitoring up")
    compose.run(f"{up} prometheus")  # no image of Grafana can be had
    query = "http://127.0.0.1:9090/api/v1/query?query=entrepot_build_info"

    def is_scraped() -> bool:
        return answers(query) and bool(json.loads(urlopen(query).read())["data"]["result"])

    wait_until(is_scraped, DEADLINE_SECONDS, lambda: compose("logs").out)


def wait_for_server(compose: ComposeProject) -> None:
    wait_until(lambda: answers("http://127.0.0.1:5000/readyz"), DEADLINE_SECONDS, lambda: compose("logs").out)


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.fixture
def machine(docker: DockerEngine, built: str, machine_image: str, folder: Path) -> Iterator[str]:
    """Runs a container with systemd. Entrepot and its units are in the folders that docs/en/deployment.md names. Yields
    the id of the container."""
    context = folder / "machine"
    shutil.copytree(ROOT / "deploy" / "systemd", context, dirs_exist_ok=True)
    (context / "Dockerfile").write_text(MACHINE_DOCKERFILE)
    docker("build", "--tag", "machine-with-entrepot", str(context))
    container = docker("run", "--detach", *SYSTEMD_OPTIONS, "machine-with-entrepot").out.strip()
    try:
        wait_until(
            lambda: docker.call.attempt("exec", container, "systemctl", "list-units").code == 0,
            DEADLINE_SECONDS,
            lambda: docker("logs", container).text,
        )
        yield container
    finally:
        docker("rm", "--force", "--volumes", container)


def run_as_root(docker: DockerEngine, machine: str, command: str, stdin_text: str = "") -> str:
    """Runs a shell command in the container as root, with `stdin_text` on its stdin, and returns its output."""
    return docker.call("exec", "--interactive", machine, "sh", "-ec", command, stdin_text=stdin_text).out


def test_systemd_runs_the_service(docker: DockerEngine, machine: str, hello: ClientImage) -> None:
    """The service starts with all its restrictions, accepts a push, reloads, and stops with exit code 0. With the
    socket unit, a connection starts the service."""

    def systemctl(*args: str) -> str:
        return docker("exec", machine, "systemctl", *args).out

    run_as_root(docker, machine, book_command("deployment", "systemctl daemon-reload"))
    # This command returns once the service has reported that it is ready.
    run_as_root(docker, machine, book_command("deployment", "systemctl enable"))
    name = "127.0.0.1:5000/team/hello:1"
    push_and_pull(docker, name, hello)
    systemctl("reload", "entrepot.service")
    systemctl("stop", "entrepot.service")
    assert (
        systemctl("show", "--property=Result,ExecMainStatus", "entrepot.service")
        == "Result=success\nExecMainStatus=0\n"
    )
    systemctl("start", "entrepot.socket")
    assert docker.call.attempt("exec", machine, "systemctl", "is-active", "entrepot.service").out == "inactive\n"
    pull_again(docker, name)
    assert systemctl("is-active", "entrepot.service") == "active\n"


def test_systemd_opens_the_registry(docker: DockerEngine, machine: str, authority: CertificateAuthority) -> None:
    """With an account, the variables of the page deployment and a key that a group may read, the service answers
    with TLS on port 443 of every address, and asks for a login."""
    pair = authority.sign("service")
    run_as_root(docker, machine, "mkdir /etc/entrepot")
    docker("cp", str(pair.certificate), f"{machine}:/etc/entrepot/fullchain.pem")
    docker("cp", str(pair.key), f"{machine}:/etc/entrepot/privkey.pem")
    run_as_root(docker, machine, "systemctl start entrepot")
    run_as_root(docker, machine, "systemctl start dbus")  # it runs on every machine, and systemd-run needs it
    add = book_command("deployment", "systemd-run", ("--pty", "--pipe --wait"))
    run_as_root(docker, machine, f"{add} --password-file -", stdin_text=PASSWORD)
    for file, content in (
        ("/etc/default/entrepot", shown_file("deployment", "cat /etc/default/entrepot")),
        ("/etc/systemd/system/entrepot.service.d/override.conf", shown_file("deployment", "systemctl edit entrepot")),
    ):
        run_as_root(docker, machine, f"mkdir -p {Path(file).parent} && cat > {file}", stdin_text=content)
    run_as_root(docker, machine, book_command("deployment", "chgrp ssl-cert"))
    run_as_root(docker, machine, book_command("deployment", "chmod 640"))
    run_as_root(docker, machine, "systemctl daemon-reload")  # `systemctl edit` does this by itself
    run_as_root(docker, machine, book_command("deployment", "systemctl restart"))
    trusting = ssl.create_default_context(cafile=str(authority.certificate))
    with pytest.raises(HTTPError, match="401"):
        urlopen("https://127.0.0.1/v2/", context=trusting, timeout=10)
