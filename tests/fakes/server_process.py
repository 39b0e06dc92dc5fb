"""Runs an Entrepot server as separate processes, for tests that send requests to a server over a socket.

`running_server` starts `entrepot serve` on a free loopback port with its own data directory, waits until the server
prints its address, and stops it with SIGTERM. It checks that the exit code is 0, so every test with `running_server`
also tests a clean shutdown.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from tests.fakes.forked_process import NO_CERTIFICATES, ForkedProcess
from tests.fakes.forked_process import ROOT as ROOT

READY = re.compile(r"listens on (https?://\S+)")
START_TIMEOUT = 60.0  # seconds
STOP_TIMEOUT = 60.0  # seconds


class ServerFailed(AssertionError):
    """The server did not start, did not end, or ended with an exit code other than 0. The text has its log."""


@dataclass
class RegistryServer:
    """A running `entrepot serve`. Its parent process starts the workers and does not serve requests itself, unless
    there is only one process."""

    process: subprocess.Popen[str] | ForkedProcess
    data: Path
    log: Path
    url: str = ""
    _ready: threading.Event = field(default_factory=threading.Event)
    _reader: threading.Thread | None = None

    @property
    def address(self) -> str:
        """`host:port`, as in an image reference."""
        return urlsplit(self.url).netloc

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    @property
    def pid(self) -> int:
        """The process id of the parent process."""
        return self.process.pid

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def log_text(self) -> str:
        """Returns all output of all processes so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def pids(self) -> list[int]:
        """Returns the process ids of the whole tree, the parent first."""
        found = [self.pid]
        for pid in found:
            found.extend(_children(pid))
        return found

    def worker_pids(self) -> list[int]:
        """Returns the ids of the processes that serve requests: all except the parent, or the parent if there is no
        other process."""
        return self.pids()[1:] or [self.pid]

    def stop(self, timeout: float = STOP_TIMEOUT) -> int:
        """Sends SIGTERM to the parent, waits until all processes have ended, and returns the exit code. Raises
        ServerFailed if they do not end within `timeout` seconds."""
        if not self.ended:
            self.process.send_signal(signal.SIGTERM)
        return self._wait(timeout, "after SIGTERM")

    def kill(self, timeout: float = STOP_TIMEOUT) -> None:
        """Sends SIGKILL to all processes, as in a crash. Returns when all have ended."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._wait(timeout, "after SIGKILL of the tree")

    def kill_parent(self, timeout: float = STOP_TIMEOUT) -> None:
        """Sends SIGKILL to the parent only. Returns when the workers have ended as well."""
        self.process.kill()
        self._wait(timeout, "after SIGKILL of the parent: workers still live")

    def _wait(self, timeout: float, when: str) -> int:
        """Waits until all processes have ended. The reading thread then reaches the end of their output, because the
        last process has closed it."""
        assert self._reader is not None
        self._reader.join(timeout)
        if self._reader.is_alive():
            self._end_group()
            raise ServerFailed(f"the server did not end within {timeout:.0f} s {when}\n{self.log_text()}")
        return self.process.wait(timeout)

    def _end_group(self) -> None:
        # The server is the leader of its own session, so its process group has only its own processes.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()

    def _follow(self, output: IO[str]) -> None:
        """Copies the output of the server to the log until it ends. Takes the URL from the line that matches READY."""
        with output, self.log.open("a") as log:
            for line in output:
                log.write(line)
                log.flush()
                if not self._ready.is_set() and (found := READY.search(line)):
                    self.url = found.group(1).rstrip("/.,")
                    self._ready.set()
        self._ready.set()


def start_server(
    folder: Path,
    *args: str,
    workers: int = 2,
    listen: str = "127.0.0.1:0",
    env: Mapping[str, str] | None = None,
    descriptors: int | None = None,
    soft_descriptors: int | None = None,
    own_interpreter: bool = False,
) -> RegistryServer:
    """Starts `entrepot serve` with its data and log below `folder`, and waits until it listens. The caller stops it.

    `args`: further flags. They come last, so they override the others. `descriptors`: the hard limit of open files of
    each process; `soft_descriptors`: the soft limit. A second start on the same folder uses the same data and appends
    to the same log. With `own_interpreter` or `descriptors`, the server runs in a new interpreter. Otherwise it is a
    `ForkedProcess`, which starts faster. Raises ServerFailed if the process ends or does not print its address."""
    data, log = folder / "data", folder / "server.log"
    folder.mkdir(parents=True, exist_ok=True)
    command = ["serve", "--data", str(data), "--listen", listen, "--workers", str(workers), *args]
    if descriptors is not None:
        limits = f"ulimit -Sn {soft_descriptors or descriptors} && ulimit -Hn {descriptors}"
        process = _start_program(folder, command, env or {}, "sh", "-c", f'{limits} && exec "$@"', "sh")
    elif own_interpreter:
        process = _start_program(folder, command, env or {})
    else:
        variables = _environment(env or {})
        process = ForkedProcess("registry", *command, cwd=folder, env=variables, stderr=subprocess.STDOUT)
    return _listening(RegistryServer(process, data, log), command)


def _listening(server: RegistryServer, command: Sequence[str], timeout: float = START_TIMEOUT) -> RegistryServer:
    """Starts the thread that reads the server's output, and waits until the server has printed its address."""
    assert server.process.stdout is not None
    server._reader = threading.Thread(target=server._follow, args=(server.process.stdout,), daemon=True)
    server._reader.start()
    if not server._ready.wait(timeout) or not server.url:
        server._end_group()
        server._reader.join(STOP_TIMEOUT)
        raise ServerFailed(f"the server did not start: {' '.join(command)}\n{server.log_text()}")
    return server


def _start_program(
    folder: Path, args: list[str], env: Mapping[str, str], *before: str
) -> subprocess.Popen[str] | ForkedProcess:
    """Starts `entrepot` in a new interpreter. `before`: words in front of the command, such as a shell with a
    script."""
    return subprocess.Popen(
        [*before, sys.executable, "-m", "registry", *args],
        cwd=folder,
        env=_environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


@contextlib.contextmanager
def running_server(
    tmp_path: Path,
    *args: str,
    workers: int = 2,
    listen: str = "127.0.0.1:0",
    env: Mapping[str, str] | None = None,
    descriptors: int | None = None,
    soft_descriptors: int | None = None,
    own_interpreter: bool = False,
) -> Iterator[RegistryServer]:
    """Runs a server (`start_server`) until the block ends. Then stops it with SIGTERM, and checks that the exit code is
    0. Does neither if the block has stopped the server itself (`stop`, `kill`). If the block fails, prints the log."""
    server = start_server(
        tmp_path,
        *args,
        workers=workers,
        listen=listen,
        env=env,
        descriptors=descriptors,
        soft_descriptors=soft_descriptors,
        own_interpreter=own_interpreter,
    )
    with _ending_well(server):
        yield server


@contextlib.contextmanager
def running_program(
    folder: Path, *command: str | Path, env: Mapping[str, str], timeout: float = START_TIMEOUT
) -> Iterator[RegistryServer]:
    """Runs a server like `running_server`, but starts it with `command`, such as an installed `entrepot serve`.

    The command runs in `folder` with exactly the environment `env`. The server must print its address within `timeout`
    seconds.
    """
    words = [str(word) for word in command]
    process = subprocess.Popen(
        words,
        cwd=folder,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    server = _listening(RegistryServer(process, folder / "data", folder / "server.log"), words, timeout)
    with _ending_well(server):
        yield server


@contextlib.contextmanager
def _ending_well(server: RegistryServer) -> Iterator[None]:
    """Stops the server when the block ends, and checks that its exit code is 0. If the block fails, prints the server's
    log."""
    try:
        yield
    except BaseException:
        print(f"--- {server.log}\n{server.log_text()}", file=sys.stderr)
        if not server.ended:
            with contextlib.suppress(ServerFailed):
                server.stop()
        raise
    if not server.ended:
        code = server.stop()
        if code != 0:
            raise ServerFailed(f"exit code {code} after SIGTERM\n{server.log_text()}")


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of this process without ENTREPOT_* variables, which would be settings of the server. Adds
    `extra`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ENTREPOT_")}
    path = os.pathsep.join(filter(None, [str(ROOT), inherited.get("PYTHONPATH", "")]))
    return {**inherited, **NO_CERTIFICATES, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **extra}


def _children(pid: int) -> list[int]:
    """Returns the ids of the child processes of all threads of a process; none if the process has ended."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found.extend(int(child) for child in (task / "children").read_text().split())
    return found
