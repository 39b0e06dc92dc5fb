"""The image and docker-compose.yml, with a real dockerd that reaches nothing but this machine.

The base image is a minimal Debian with Python. It is pushed to a registry of ours as `library/python`, and dockerd has
that registry as its mirror of Docker Hub, so that the Dockerfile is built as it is. All of it is in a network of its
own, where the published ports are free and dockerd may change the firewall.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from registry import __version__
from tests.fakes.certificate_authority import CertificateAuthority
from tests.fakes.client_images import ClientImage, image
from tests.fakes.clients.docker_engine import DockerEngine, running_docker
from tests.fakes.clients.programs import wait_until
from tests.fakes.compose_project import ComposeProject, compose_project
from tests.fakes.debian_tree import DebianTree, make_debian_tree, unpack_package
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
    tree.install("nginx-light", "systemd")
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
        what = ("--file", str(ROOT / "deploy" / "Dockerfile"), "--tag", name, *arguments, str(ROOT))
        docker("build", "--pull", "--network", "host", *what, timeout=1200)
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


def test_the_image_has_labels_and_a_user(docker: DockerEngine, built: str) -> None:
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


def test_the_container_runs_with_a_read_only_root(docker: DockerEngine, built: str, hello: ClientImage) -> None:
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


def test_the_container_requires_an_account(docker: DockerEngine, built: str) -> None:
    """Without accounts it does not start, and says what to do; after that it starts."""
    volume = ("--volume", "accounts:/var/lib/entrepot")
    refused = docker.call.attempt("run", "--rm", *HARDENED, *volume, built)
    assert refused.code != 0
    assert "entrepot user add NAME --admin" in refused.err
    add = ("user", "add", "alice", "--admin", "--password-file", "-")
    docker.call("run", "--rm", "--interactive", *HARDENED, *volume, built, *add, given=PASSWORD)
    container = docker("run", "--detach", *HARDENED, *volume, *HEALTH_EVERY_SECOND, built).out.strip()
    wait_for_health(docker, container)
    docker("rm", "--force", container)
    docker("volume", "rm", "accounts")


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
def started_project(docker: DockerEngine, program: str) -> Iterator[ComposeProject]:
    """The registry of docker-compose.yml runs, without the profiles. All is removed at the end."""
    project = compose_project(docker, program)
    try:
        project("up", "--detach")
        wait_for_server(project)
        yield project
    finally:
        project("--profile", "tls", "--profile", "monitoring", "down", "--volumes", "--timeout", "30")


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
    container."""
    compose = any_compose
    assert published(docker, compose.container("entrepot"), 5000) == "127.0.0.1:5000"
    name = "127.0.0.1:5000/team/hello:1"
    push_and_pull(docker, name, hello)
    settings = compose("exec", "-T", "entrepot", "entrepot", "config", "--format", "toml").out
    assert re.search(r'^name = "docker\.io"$', settings, re.MULTILINE)
    compose("up", "--detach", "--force-recreate")
    wait_for_server(compose)
    pull_again(docker, name)


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
    add = ("entrepot", "user", "add", "alice", "--admin", "--password-file", "-")
    compose("exec", "-T", "entrepot", *add, given=PASSWORD)
    pair = authority.sign("nginx", also=NGINX)
    (folder / "tls").mkdir()
    shutil.copy(pair.certificate, folder / "tls" / "fullchain.pem")
    shutil.copy(pair.key, folder / "tls" / "privkey.pem")
    compose.set_variables(
        ENTREPOT_PUBLIC_URL=f"https://{NGINX}",
        ENTREPOT_INSECURE_OPEN="false",
        ENTREPOT_PUBLISH_TLS="443",
        ENTREPOT_TLS_FOLDER=str(folder / "tls"),
    )
    compose("--profile", "tls", "up", "--detach")
    assert published(docker, compose.container("nginx"), 443) == "0.0.0.0:443"
    name = f"{NGINX}/team/hello:1"
    docker.load(hello, name)
    wait_until(
        lambda: docker.call.attempt("login", "--username", "alice", "--password", PASSWORD, NGINX).code == 0,
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
    compose("--profile", "monitoring", "up", "--detach", "prometheus")
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


def test_systemd_runs_the_service(docker: DockerEngine, machine: str, hello: ClientImage) -> None:
    """The service starts under all its restrictions, takes a push, reloads, and stops cleanly. With the socket, a
    connection starts it."""

    def systemctl(*args: str) -> str:
        return docker("exec", machine, "systemctl", *args).out

    systemctl("start", "entrepot.service")  # returns once the service has said that it is ready
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
