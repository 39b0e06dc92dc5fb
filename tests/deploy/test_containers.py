"""The image and docker-compose.yml, with a real dockerd that reaches nothing but this machine.

The base image is a minimal Debian with Python. It is pushed to a registry of ours as `library/python`, and dockerd has
that registry as its mirror of Docker Hub, so that the Dockerfile is built as it is. All of it is in a network of its
own, where the published ports are free and dockerd may change the firewall.
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
"""Its address in docker-compose.yml."""
PASSWORD = "correct horse battery"
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
HEALTH_EVERY_SECOND = ("--health-interval", "1s")
DEADLINE_SECONDS = 60.0
PROMETHEUS = """
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
MACHINE = """
FROM machine
RUN rm -f /lib/systemd/system/*.target.wants/* /etc/systemd/system/*.target.wants/*
COPY --from=entrepot:latest /opt/entrepot /opt/entrepot
COPY . /etc/systemd/system/
CMD ["/lib/systemd/systemd"]
"""
"""Nothing runs in it that could change settings of the real machine."""
AS_A_MACHINE = (
    *("--network", "host", "--tmpfs", "/run", "--tmpfs", "/tmp", "--volume", "/sys/fs/cgroup:/sys/fs/cgroup"),
    *("--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined", "--env", "container=docker"),
)

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with system_folder() as made:
        yield made


@pytest.fixture(scope="module")
def python_tree(folder: Path) -> DebianTree:
    """What `python:3.11-slim` has, as far as it matters."""
    return make_debian_tree(folder / "python", "ca-certificates", "python-is-python3", "python3", "python3-venv")


@pytest.fixture(scope="module")
def programs_tree(python_tree: DebianTree, folder: Path) -> DebianTree:
    """A system that stands for the image of nginx, and for a machine with systemd."""
    tree = python_tree.copy(folder / "programs")
    tree.install("nginx-light", "ssl-cert", "systemd")
    tree.run("nginx", "-t", "-q")  # makes its folders
    for name in ("access", "error"):
        log = tree.folder / "var" / "log" / "nginx" / f"{name}.log"
        log.unlink(missing_ok=True)
        log.symlink_to("/dev/stderr")
    return tree


@pytest.fixture(scope="module")
def packages(python_tree: DebianTree, folder: Path) -> Path:
    """The packages of the lock files for the Python of the base image."""
    version = python_tree.run("python", "-c", "import sys; print(*sys.version_info[:2], sep='.')").strip()
    made = folder / "packages"
    download_packages(made, version, ROOT / "requirements" / "build.txt", ROOT / "requirements" / "runtime.txt")
    return made


@pytest.fixture(scope="module")
def compose_2(folder: Path) -> Path:
    """The program of compose 2, as Debian 13 has it."""
    return unpack_package(folder / "compose", "docker-compose", "trixie") / "usr" / "bin" / "docker-compose"


@pytest.fixture(scope="module")
def network(python_tree: DebianTree, programs_tree: DebianTree, packages: Path, compose_2: Path) -> Iterator[None]:
    """Everything that comes from elsewhere is here before."""
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
    """It trusts the authority for what nginx serves."""
    trusted = folder / "etc" / "certs.d" / NGINX
    trusted.mkdir(parents=True)
    shutil.copy(authority.certificate, trusted / "ca.crt")
    (folder / "docker").mkdir()
    options = ("--registry-mirror", mirror.url, "--storage-driver", "overlay2")
    with running_docker(folder / "docker", *options, etc=folder / "etc", networks=True) as running:
        yield running


@pytest.fixture(scope="module")
def built(docker: DockerEngine, mirror: RegistryServer, python_tree: DebianTree, packages: Path, folder: Path) -> str:
    """The image, built from the repository and from nothing that is not on this machine."""
    base = f"{mirror.address}/library/python:3.11-slim"
    archive = python_tree.write_archive(folder / "python.tar")
    docker("import", str(archive), base)
    docker("push", base)
    docker.forget(base)
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
    docker.forget(name)
    docker("pull", name)
    assert docker.output_of(name) == "hello from a container\n"


def published(docker: DockerEngine, container: str, port: int) -> str:
    return docker("port", container, str(port)).out.split()[0]


def in_image(docker: DockerEngine, name: str, program: str, *args: str) -> str:
    return docker("run", "--rm", "--user", "0", "--entrypoint", program, name, *args).out


def health(docker: DockerEngine, container: str) -> str:
    return docker("inspect", "--format", "{{.State.Health.Status}}", container).out.strip()


def wait_for_health(docker: DockerEngine, container: str) -> None:
    wait_until(lambda: health(docker, container) == "healthy", DEADLINE_SECONDS, lambda: docker("logs", container).text)


def test_the_image_says_what_it_is(docker: DockerEngine, built: str) -> None:
    """It has the labels of the OCI's image spec, and runs as a user who is not root."""
    config = docker.inspect(built)["Config"]
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items()}
    assert labels["title"] == "Entrepot"
    assert (labels["licenses"], labels["version"], labels["revision"]) == ("Apache-2.0", __version__, "0123abc")
    assert config["User"] == "10001:10001"
    assert docker("run", "--rm", built, "--version").out.split()[-1] == __version__


def test_the_image_has_only_what_it_needs(docker: DockerEngine, built: str) -> None:
    """It has no pip, compiler or build tool, and no program that gives other rights; all that the server imports has
    its bytecode; and it is hardly larger than its base image."""
    names = " -o ".join(f"-name {name}" for name in ("pip", "pip-*", "ensurepip", "setuptools", "hatchling", "wheel"))
    assert in_image(docker, built, "sh", "-fc", f"find / -xdev {names}") == ""
    assert in_image(docker, built, "sh", "-c", "command -v pip pip3 gcc cc c++ make || true") == ""
    assert in_image(docker, built, "find", "/", "-xdev", "-type", "f", "-perm", "/6000") == ""
    modules = "import registry.app, registry.cli.command, registry.cli.serve_command"
    verbose = docker("run", "--rm", "--entrypoint", "python", built, "-v", "-c", modules).err
    assert re.findall(r"^# code object from '(\S+\.py)'", verbose, re.MULTILINE) == []
    assert docker.inspect(built)["Size"] < 1.5 * docker.inspect("python:3.11-slim")["Size"]


def test_it_runs_read_only(docker: DockerEngine, built: str, hello: ClientImage) -> None:
    """With a read-only root and without any capability it turns healthy and takes a push. The content survives a
    restart. SIGTERM ends it with exit code 0."""
    options = ("--publish", "127.0.0.1::5000", "--env", "ENTREPOT_INSECURE_OPEN=true", *HEALTH_EVERY_SECOND)
    container = docker("run", "--detach", *HARDENED, *options, built).out.strip()
    wait_for_health(docker, container)
    push_and_pull(docker, f"{published(docker, container, 5000)}/team/hello:1", hello)
    docker.forget(f"{published(docker, container, 5000)}/team/hello:1")
    docker("restart", container)
    wait_for_health(docker, container)
    name = f"{published(docker, container, 5000)}/team/hello:1"
    docker("pull", name)
    assert docker.output_of(name) == "hello from a container\n"
    docker("stop", container)
    assert docker("inspect", "--format", "{{.State.ExitCode}}", container).out == "0\n"
    docker("rm", "--volumes", container)


def test_it_asks_for_an_account(docker: DockerEngine, built: str) -> None:
    """Without accounts it does not start, and says what to do. With the commands of the page deployment it gets an
    account and starts."""
    volume = ("--volume", "entrepot-data:/var/lib/entrepot")
    refused = docker.call.attempt("run", "--rm", *HARDENED, *volume, built)
    assert refused.code != 0
    assert "entrepot user add NAME --admin" in refused.err
    add = shlex.split(book_command("deployment", "docker run --rm", ("-it", "-i")))
    docker.call(*add[1:], "--password-file", "-", given=PASSWORD)
    *run, name = shlex.split(book_command("deployment", "docker run -d"))
    container = docker(*run[1:], *HEALTH_EVERY_SECOND, name).out.strip()
    wait_for_health(docker, container)
    assert published(docker, container, 5000) == "127.0.0.1:5000"
    docker("rm", "--force", container)
    docker("volume", "rm", "entrepot-data")


@pytest.fixture
def compose(docker: DockerEngine, built: str, compose_2: Path) -> Iterator[ComposeProject]:
    """What people have today."""
    with started_project(docker, str(compose_2)) as project:
        yield project


@pytest.fixture(params=["of this Debian", "2"])
def any_compose(
    request: pytest.FixtureRequest, docker: DockerEngine, built: str, compose_2: Path
) -> Iterator[ComposeProject]:
    """Debian 12 has 1.29."""
    with started_project(docker, str(compose_2) if request.param == "2" else "docker-compose") as project:
        yield project


@contextmanager
def started_project(docker: DockerEngine, program: str, *overrides: Path) -> Iterator[ComposeProject]:
    """The registry of docker-compose.yml runs, without the profiles. All is removed at the end."""
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
    """The images of nginx and Prometheus under the names that docker-compose.yml has for them."""
    text = (ROOT / "docker-compose.yml").read_text()
    (nginx,) = re.findall(r"image: (nginx:\S+)", text)
    (prometheus,) = re.findall(r"image: (prom/prometheus:\S+)", text)
    docker("tag", machine_image, nginx)
    program = shutil.which("prometheus")
    assert program
    (folder / "prometheus").mkdir()
    shutil.copy(program, folder / "prometheus" / "prometheus")
    (folder / "prometheus" / "Dockerfile").write_text(PROMETHEUS)
    docker("build", "--tag", prometheus, str(folder / "prometheus"))


def test_compose(docker: DockerEngine, any_compose: ComposeProject, hello: ClientImage) -> None:
    """`up` publishes a registry that mirrors Docker Hub on the loopback address alone. A push survives a new
    container. Commands in the container reach the running server."""
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
    assert "GET /v2/team/hello/manifests/1" in log


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
    """After the steps at the top of the file, docker logs in, pushes and pulls through nginx with TLS. Without a login
    it gets nothing. The registry sees the address of the client."""
    add = book_command("deployment", "docker compose exec entrepot entrepot user add", ("exec", "exec -T"))
    compose.run(f"{add} --password-file -", given=PASSWORD)
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
    docker.forget(name)
    assert docker.call.attempt("pull", name).code != 0
    log = compose("logs", "entrepot").out
    addresses = re.findall(r"PUT /v2/team/hello/manifests/1 .* address=(\S+)", log)
    assert addresses
    assert NGINX not in addresses


def test_compose_with_prometheus(compose: ComposeProject, other_images: None) -> None:
    """Prometheus scrapes the registry's metrics."""
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
    """A container in which systemd runs, with Entrepot and its units where docs/en/deployment.md puts them."""
    context = folder / "machine"
    shutil.copytree(ROOT / "deploy" / "systemd", context)
    (context / "Dockerfile").write_text(MACHINE)
    docker("build", "--tag", "machine-with-entrepot", str(context))
    container = docker("run", "--detach", *AS_A_MACHINE, "machine-with-entrepot").out.strip()
    try:
        wait_until(
            lambda: docker.call.attempt("exec", container, "systemctl", "list-units").code == 0,
            DEADLINE_SECONDS,
            lambda: docker("logs", container).text,
        )
        yield container
    finally:
        docker("rm", "--force", "--volumes", container)


def run_as_root(docker: DockerEngine, machine: str, command: str, given: str = "") -> str:
    """Runs a shell command in the container as root, with `given` on its stdin, and returns its output."""
    return docker.call("exec", "--interactive", machine, "sh", "-ec", command, given=given).out


def test_systemd_runs_the_service(docker: DockerEngine, machine: str, hello: ClientImage) -> None:
    """The service starts under all its restrictions, takes a push, reloads, and stops cleanly. With the socket, a
    connection starts it."""

    def systemctl(*args: str) -> str:
        return docker("exec", machine, "systemctl", *args).out

    run_as_root(docker, machine, book_command("deployment", "systemctl daemon-reload"))
    # This command returns when the service has said that it is ready.
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
    add = book_command("deployment", "/opt/entrepot/bin/entrepot user add")
    run_as_root(docker, machine, f"{add} --password-file -", given=PASSWORD)
    for file, content in (
        ("/etc/default/entrepot", shown_file("deployment", "cat /etc/default/entrepot")),
        ("/etc/systemd/system/entrepot.service.d/override.conf", shown_file("deployment", "systemctl edit entrepot")),
    ):
        run_as_root(docker, machine, f"mkdir -p {Path(file).parent} && cat > {file}", given=content)
    run_as_root(docker, machine, book_command("deployment", "chgrp ssl-cert"))
    run_as_root(docker, machine, book_command("deployment", "chmod 640"))
    run_as_root(docker, machine, "systemctl daemon-reload")  # `systemctl edit` does this by itself
    run_as_root(docker, machine, book_command("deployment", "systemctl restart"))
    trusting = ssl.create_default_context(cafile=str(authority.certificate))
    with pytest.raises(HTTPError, match="401"):
        urlopen("https://127.0.0.1/v2/", context=trusting, timeout=10)
