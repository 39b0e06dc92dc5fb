"""Starts the registries that the bench measures. Each server is a process tree on a free loopback port."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench.errors import BenchFailed
from bench.system.machine import package_version
from bench.system.process_tree import children_cpu, tree_cpu_seconds, tree_pss
from bench.system.programs import REPOSITORY_ROOT, START_TIMEOUT, clean_environment, run_to_end, running_program

HOST = "127.0.0.1"
HOSTED_PREFIX = "team"
"""Clients can push repositories below this prefix to an Entrepot that mirrors an upstream."""
COMMAND_TIMEOUT = 60.0  # seconds


@dataclass(frozen=True)
class ServerProgram:
    """A registry program: its name, its version, and how to start it."""

    name: str
    version: Callable[[], str]
    command: Callable[[Path, int, str | None], list[str]]
    """Returns the command that starts a server. Its arguments are the server's folder, the port, and the URL of the
    upstream to mirror; None: mirror no upstream."""
    root: Path = REPOSITORY_ROOT
    """The checkout from which the code comes, if the program is an Entrepot."""
    is_entrepot: bool = True


@dataclass(frozen=True)
class RunningServer:
    """A running registry."""

    program: ServerProgram
    port: int
    process: subprocess.Popen[bytes]
    start_seconds: float
    """Seconds from exec to the first good response to GET /v2/."""

    @property
    def name(self) -> str:
        return self.program.name

    @property
    def is_entrepot(self) -> bool:
        return self.program.is_entrepot

    @property
    def url(self) -> str:
        return local_url(self.port)

    def cpu(self) -> float:
        """Returns the CPU seconds of the whole process tree so far."""
        return tree_cpu_seconds(self.process.pid)

    def pss(self) -> int:
        """Returns the memory of the whole process tree in bytes."""
        return tree_pss(self.process.pid)


class Meter:
    """Measures the time, and the CPU time of a server and of the loaders, from the creation of this object on."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._cpu, self._loader_cpu, self._begun = server.cpu(), children_cpu(), time.perf_counter()

    def cpu(self) -> float:
        """Returns the CPU seconds that the server has used."""
        return self._server.cpu() - self._cpu

    def loader_cpu(self) -> float:
        """Returns the CPU seconds of all loaders that have ended."""
        return children_cpu() - self._loader_cpu

    def seconds(self) -> float:
        """Returns the elapsed time in seconds."""
        return time.perf_counter() - self._begun


def _entrepot_version() -> str:
    from registry import __version__

    return __version__


def _entrepot_command(folder: Path, port: int, upstream: str | None) -> list[str]:
    """Returns the command for an Entrepot with two workers and default settings. A mirror also gets the upstream, and
    the prefix HOSTED_PREFIX for pushed images."""
    command = [sys.executable, "-m", "registry", "serve", "--workers", "2", "--listen", f"{HOST}:{port}"]
    command += ["--data", str(folder / "data")]
    if upstream is None:
        return command
    path = folder / "config.toml"
    path.write_text(
        f'[[upstream]]\nname = "docker.io"\nendpoints = ["{upstream}"]\ndefault = true\n\n'
        f'[hosted]\nprefixes = ["{HOSTED_PREFIX}/**"]\n'
    )
    return [*command, "--config", str(path)]


def _docker_registry_command(folder: Path, port: int, upstream: str | None) -> list[str]:
    """Returns the command for docker-registry with the fastest configuration: Debian's (descriptors cached in memory),
    but with less logging."""
    config: dict[str, object] = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str(folder / "data")},
            "cache": {"blobdescriptor": "inmemory"},
            "delete": {"enabled": True},
        },
        "http": {"addr": f"{HOST}:{port}", "secret": "bench"},
        **({"proxy": {"remoteurl": upstream}} if upstream else {}),
    }
    path = folder / "config.yml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return ["docker-registry", "serve", str(path)]


ENTREPOT = ServerProgram("Entrepot", _entrepot_version, _entrepot_command)
DOCKER_REGISTRY = ServerProgram(
    "docker-registry", lambda: package_version("docker-registry"), _docker_registry_command, is_entrepot=False
)


def entrepot_checkout(root: Path) -> ServerProgram:
    """Returns the Entrepot of another checkout. A bench compares it with the Entrepot of this checkout. Raises
    BenchFailed if the folder is not a checkout of Entrepot."""
    root = root.resolve()
    if not (root / "registry" / "__main__.py").is_file():
        raise BenchFailed(f"{root} holds no checkout of Entrepot")
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    version = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return replace(ENTREPOT, name=f"Entrepot {version}", version=lambda: version, root=root)


def run_entrepot(program: ServerProgram, folder: Path, *arguments: str) -> str:
    """Runs an Entrepot command of `program` on the data directory in `folder`, and returns its output. Raises
    TrialFailed."""
    command = [sys.executable, "-m", "registry", *arguments, "--data", str(folder / "data")]
    return run_to_end(command, COMMAND_TIMEOUT, env=clean_environment(folder, PYTHONPATH=str(program.root)))


def local_url(port: int) -> str:
    """Returns the URL of a server on this machine."""
    return f"http://{HOST}:{port}"


def free_port() -> int:
    """Returns a port that no program listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def started_server(program: ServerProgram, folder: Path, upstream: str | None = None) -> Iterator[RunningServer]:
    """Runs a registry on `folder` until the block ends. The block begins once the registry answers GET /v2/. Raises
    BenchFailed."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = program.command(folder, port, upstream)
    begun = time.perf_counter()
    with running_program(command, folder / "server.log", ready=partial(is_serving, port), code=program.root) as process:
        yield RunningServer(program, port, process, time.perf_counter() - begun)


def is_serving(port: int) -> bool:
    """Returns whether a registry answers GET /v2/ on the port, with 200 or with 401 (login required)."""
    connection = http.client.HTTPConnection(HOST, port, timeout=START_TIMEOUT)
    try:
        connection.request("GET", "/v2/")
        return connection.getresponse().status in (200, 401)
    except OSError:
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def sampled_memory(server: RunningServer, interval: float, peaks: dict[str, int]) -> Iterator[None]:
    """Reads the memory of a server every `interval` seconds and at the end of the block. Stores the highest value, in
    bytes, in `peaks` under the server's name. Each reading takes some milliseconds of kernel time."""
    ended = threading.Event()

    def sample() -> None:
        peaks[server.name] = max(peaks.get(server.name, 0), server.pss())

    def sample_repeatedly() -> None:
        while not ended.wait(interval):
            sample()

    thread = threading.Thread(target=sample_repeatedly, name="memory sampler", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        sample()
