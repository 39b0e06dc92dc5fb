"""The servers under test, each a process tree of its own on a free loopback port.

The most memory a server took while it was under load.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.errors import BenchFailed
from bench.loaders.http_client import HOST
from bench.system.machine import package_version
from bench.system.process_tree import clean_environment, log_tail, running_program, tree_cpu_seconds, tree_pss

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT = 60.0
POLL_SECONDS = 0.002


@dataclass(frozen=True)
class ServerProgram:
    """A registry program: what it is called, which version is here, and how it is started."""

    name: str
    version: Callable[[], str]
    command: Callable[[Path, int], list[str]]
    """From the folder it may write to and the port it is to listen on."""
    root: Path = REPOSITORY_ROOT
    """The checkout whose code runs, if the program is an Entrepot."""
    accounts: bool = False
    """The program has accounts and a token service."""


@dataclass(frozen=True)
class RunningServer:
    """A running registry."""

    kind: ServerProgram
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    start_seconds: float
    """Seconds from exec to the first 200 on /v2/."""

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def cpu(self) -> float:
        """CPU seconds of the whole tree so far."""
        return tree_cpu_seconds(self.process.pid)

    def pss(self) -> int:
        """Bytes of memory of the whole tree."""
        return tree_pss(self.process.pid)


def _entrepot_version() -> str:
    from registry import __version__

    return __version__


def entrepot_command(folder: Path, port: int) -> list[str]:
    """The defaults, with two workers."""
    command = [sys.executable, "-m", "registry", "serve"]
    return [*command, "--workers", "2", "--listen", f"{HOST}:{port}", "--data", str(folder / "data")]


def _docker_registry_command(folder: Path, port: int) -> list[str]:
    """Debian's set-up (the cache of descriptors in memory), with less to log than its default: that is its best."""
    config = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str(folder / "data")},
            "cache": {"blobdescriptor": "inmemory"},
            "delete": {"enabled": True},
        },
        "http": {"addr": f"{HOST}:{port}", "secret": "bench"},
    }
    path = folder / "config.yml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return ["docker-registry", "serve", str(path)]


ENTREPOT = ServerProgram("Entrepot", _entrepot_version, entrepot_command, accounts=True)
DOCKER_REGISTRY = ServerProgram("docker-registry", lambda: package_version("docker-registry"), _docker_registry_command)


def entrepot_checkout(root: Path) -> ServerProgram:
    """The Entrepot of another checkout, to compare two versions in one run. Raises BenchFailed for a folder that holds
    none."""
    root = root.resolve()
    if not (root / "registry" / "__main__.py").is_file():
        raise BenchFailed(f"{root} holds no checkout of Entrepot")
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False)
    version = told.stdout.strip() or "unknown"
    return replace(ENTREPOT, name=f"Entrepot {version}", version=lambda: version, root=root)


def run_entrepot(kind: ServerProgram, folder: Path, *arguments: str) -> str:
    """Runs a command of that Entrepot on the data directory in `folder`, and returns its stdout. Raises BenchFailed."""
    command = [sys.executable, "-m", "registry", *arguments, "--data", str(folder / "data")]
    env = clean_environment(folder, PYTHONPATH=str(kind.root))
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchFailed(f"{kind.name}: {' '.join(arguments)}: {done.stderr[-2000:]}")
    return done.stdout


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def started_server(kind: ServerProgram, folder: Path) -> Iterator[RunningServer]:
    """Starts a registry on `folder`, waits for its first 200, and ends it with the block. Raises BenchFailed."""
    folder.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), folder / "server.log"
    command = kind.command(folder, port)
    env = clean_environment(folder, PYTHONPATH=str(kind.root), PYTHONUNBUFFERED="1")
    begun = time.perf_counter()
    with running_program(command, env, log, folder) as process:
        while not is_serving(port):
            if process.poll() is not None or time.perf_counter() - begun > START_TIMEOUT:
                raise BenchFailed(f"{kind.name} did not start: {' '.join(command)}\n{log_tail(log)}")
            time.sleep(POLL_SECONDS)
        yield RunningServer(kind, port, process, log, time.perf_counter() - begun)


def is_serving(port: int) -> bool:
    """Whether a registry serves there, perhaps to those who have logged in."""
    connection = http.client.HTTPConnection(HOST, port, timeout=START_TIMEOUT)
    try:
        connection.request("GET", "/v2/")
        return connection.getresponse().status in (200, 401)
    except OSError:
        return False
    finally:
        connection.close()


def describe_machine(folder: Path) -> dict[str, object]:
    """What the figures were taken on."""
    from storage.data_dir.check import filesystem_of

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / (1 << 30), 1),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
        "file_system": filesystem_of(folder),
    }


def check_space(folder: Path, needed: int) -> None:
    """Raises BenchFailed where the disk has fewer bytes free than are needed."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BenchFailed(f"{folder.parent} has {free >> 30} GiB free, and {needed >> 30} are needed; see --folder")


MEMORY_INTERVAL_SECONDS = 1.0
"""Seconds between two looks: reading the size of a process tree takes the kernel some milliseconds."""


class PeakMemory:
    """Looks at one server after the other, whichever is under load; a context manager."""

    def __init__(self, every: float = MEMORY_INTERVAL_SECONDS) -> None:
        self._every = every
        self.peaks: dict[str, int] = {}
        """Bytes by server name."""
        self._server: RunningServer | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def watch_server(self, server: RunningServer | None) -> None:
        """From now on it is this one's turn."""
        self._server = server

    def _look(self) -> None:
        while not self._ended.wait(self._every):
            if (server := self._server) is not None:
                self.peaks[server.name] = max(self.peaks.get(server.name, 0), server.pss())
