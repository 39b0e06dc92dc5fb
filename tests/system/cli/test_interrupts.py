"""Tests that SIGINT and SIGTERM end every command at once, whatever the command waits for."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from storage.composition import prepare_data_dir
from tests.fakes.commands import (
    STACK_DUMP,
    command_environment,
    entrepot_output,
    has_received_signals,
    is_waiting_for_lock,
    wait_for_output,
)
from tests.fakes.forked_process import ForkedProcess
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.upstream_content import UpstreamContent, noise_image

MIB = 1 << 20
TIMEOUT_SECONDS = 100.0
SIGINT_IGNORED = ("/bin/sh", "-c", 'trap "" INT; exec "$0" "$@"')
"""A program that starts a command with SIGINT ignored, as a shell without job control starts background commands."""
WRITING_COMMANDS = [
    ["user", "add", "bob", "--generate"],
    ["group", "add", "dev"],
    ["robot", "add", "ci"],
    ["grant", "add", "team/**", "pull", "everyone"],
    ["key", "rotate"],
    ["mirror", "warm", "app:1", "--mirror", "docker.io"],
]
"""Commands that change the data directory. All but the last wait for the lock of the metadata."""
OTHER_COMMANDS = [
    ["serve"],
    ["config"],
    ["client", "docker"],
    ["inspect", "team/app"],
    ["audit"],
    ["token", "list"],
    ["mirror", "status"],
    ["mirror", "refresh", "app:1"],
    ["mirror", "purge", "app:1"],
]
STALLS = {
    "manifest": {"on": "manifest", "method": "", "stall": True},
    "token": {"on": "token", "method": "", "stall": True},
    "headers of a blob": {"on": "blob", "stall": True},
    "body of a blob": {"on": "blob", "stall_after": MIB},
}
"""The places at which the fake upstream stops a response, as arguments of `Hub.fault`."""
INTERRUPTED = "entrepot: interrupted"
"""The beginning of the line that an interrupted command prints."""
Command = subprocess.Popen[str] | ForkedProcess


@contextmanager
def running_command(folder: Path, *args: str, before: tuple[str, ...] = (), first_lines: str = "") -> Iterator[Command]:
    """Runs the command during the block. With `before`, starts a new program with these words before the command.
    Without, forks this process, which is faster; the process then runs the Python code `first_lines` first."""
    with _start(folder, list(args), before, first_lines) as process:
        try:
            yield process
        finally:
            process.kill()


def _start(folder: Path, args: list[str], before: tuple[str, ...], first_lines: str) -> Command:
    """Starts the process of `running_command`."""
    if not before:
        site = folder / "first_lines.py"
        site.write_text(f"{Path(STACK_DUMP, 'sitecustomize.py').read_text()}\n{first_lines}\n")
        return ForkedProcess("registry", *args, cwd=folder, env=command_environment(), site=str(site))
    return subprocess.Popen(
        [*before, sys.executable, "-m", "registry", *args],
        cwd=folder,
        env=command_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition: Callable[[], bool], process: Command) -> None:
    """Waits until `condition()` returns True. Fails if the process ends before."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the expected state was not reached in time"
        time.sleep(0.005)


def check_interrupt(process: Command, number: int = signal.SIGINT) -> None:
    """Sends the signal with this number, and checks that the command ends with one line and the exit code of the
    signal."""
    process.send_signal(number)
    out, err = wait_for_output(process)
    assert (process.returncode, out) == (128 + number, "")
    (line,) = err.splitlines()
    assert line.startswith(INTERRUPTED)


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Hub]:
    """Runs an upstream with one image. It requires bearer tokens."""
    content = UpstreamContent()
    content.add("library/app", noise_image("app", 2 * MIB), "1")
    with hub(tmp_path, content, auth="bearer") as running:
        yield running


def settings(folder: Path, url: str, more: str = "") -> list[str]:
    """Returns the options for a command that uses the upstream at `url`."""
    text = f'[[upstream]]\nname = "docker.io"\ndefault = true\nendpoints = ["{url}"]\n{more}'
    (folder / "entrepot.toml").write_text(text)
    return ["--config", "entrepot.toml"]


# Commands that wait for an upstream


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stall", STALLS)
def test_upstream_stalls(tmp_path: Path, upstream: Hub, stall: str, number: int) -> None:
    """If the upstream stops in the middle of a response, the command still ends at once."""
    upstream.fault(**STALLS[stall], times=None)
    config = settings(tmp_path, upstream.url)
    with running_command(tmp_path, "mirror", "warm", "app:1", *config) as process:
        kind = str(STALLS[stall]["on"])
        until(lambda: any(each.start < each.stop or not each.status for each in upstream.requests(kind)), process)  # type: ignore[arg-type]
        check_interrupt(process, number)


@pytest.mark.parametrize("command", ["warm", "refresh"])
def test_started_with_interrupts_ignored(tmp_path: Path, upstream: Hub, command: str) -> None:
    """A shell script starts its background commands with SIGINT ignored. A command that was started in this way still
    ends on SIGINT."""
    upstream.fault(on="manifest", method="", stall=True, times=None)
    config = settings(tmp_path, upstream.url)
    with running_command(tmp_path, "mirror", command, "app:1", *config, before=SIGINT_IGNORED) as process:
        until(lambda: upstream.count("manifest") > 0, process)
        check_interrupt(process)


def test_upstream_does_not_accept_the_connection(tmp_path: Path) -> None:
    """If the upstream does not accept the connection, the command still ends at once."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as stack:
        port = full.getsockname()[1]
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        config = settings(tmp_path, f"http://127.0.0.1:{port}", 'connect_timeout = "10m"\n')
        connecting_before = count_connecting(port)
        with running_command(tmp_path, "mirror", "refresh", "app:1", *config) as process:
            until(lambda: count_connecting(port) > connecting_before, process)
            check_interrupt(process)


def count_connecting(port: int) -> int:
    """Returns the number of connections to this port that are being opened (proc(5), net/tcp)."""
    # Field 2 is the remote address, field 3 the state. State 02 is SYN_SENT.
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[2].endswith(f":{port:04X}") and line[3] == "02" for line in lines)


def test_upstream_does_not_answer_the_tls_handshake(tmp_path: Path) -> None:
    """If the upstream accepts the connection but never answers the TLS handshake, the command still ends at once."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = settings(tmp_path, f"https://127.0.0.1:{silent.getsockname()[1]}")
        with running_command(tmp_path, "mirror", "refresh", "app:1", *config) as process:
            silent.settimeout(TIMEOUT_SECONDS)
            with silent.accept()[0] as client:
                assert client.recv(1) == b"\x16"  # the first byte of a TLS handshake
                check_interrupt(process)


# Commands that wait for something else


def test_thread_that_blocks_for_ever(tmp_path: Path) -> None:
    """The command ends although one of its threads blocks for ever, here while it reads the file with the upstream's
    certificates."""
    os.mkfifo(tmp_path / "ca.pem")
    config = settings(tmp_path, "https://127.0.0.1:9", f'ca_file = "{tmp_path}/ca.pem"\n')
    with (
        running_command(tmp_path, "mirror", "refresh", "app:1", *config) as process,
        feeding(tmp_path / "ca.pem", process),
    ):
        check_interrupt(process)


@contextmanager
def feeding(pipe: Path, process: Command) -> Iterator[None]:
    """Waits until the process reads from the named pipe. Then keeps the write end of the pipe open during the block, so
    that the read never ends."""
    writers: list[int] = []

    def try_open() -> bool:
        try:
            writers.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # ENXIO: no process reads from the pipe yet
            return False
        return True

    until(try_open, process)
    try:
        yield
    finally:
        os.close(writers[0])


@pytest.mark.parametrize("command", [*OTHER_COMMANDS, *WRITING_COMMANDS], ids=" ".join)
def test_command_that_reads_its_settings(tmp_path: Path, command: list[str]) -> None:
    """A command that is still reading its settings ends at once, even if it was started with SIGINT ignored."""
    os.mkfifo(tmp_path / "settings.toml")
    with (
        running_command(tmp_path, *command, "--config", "settings.toml", before=SIGINT_IGNORED) as process,
        feeding(tmp_path / "settings.toml", process),
    ):
        check_interrupt(process)


@contextmanager
def holding(lock: Path) -> Iterator[None]:
    """Holds the lock during the block, so that no other process can take it."""
    with lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize("command", WRITING_COMMANDS[:-1], ids=" ".join)
def test_another_process_holds_the_lock(tmp_path: Path, command: list[str]) -> None:
    """A command that waits for another process's lock on the metadata ends at once, and has changed nothing."""
    prepare_data_dir(tmp_path / "data")
    with holding(tmp_path / "data" / "locks" / "metadata"), running_command(tmp_path, *command) as process:
        until(lambda: is_waiting_for_lock(process), process)
        check_interrupt(process)
    assert json.loads(entrepot_output("audit", "--json", folder=tmp_path)) == []


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_second_signal(tmp_path: Path, numbers: tuple[int, int]) -> None:
    """If a command is still running after a first signal, a second signal ends it at once, with the exit code of the
    second signal."""
    prepare_data_dir(tmp_path / "data")
    # On a busy machine, the test may take longer than the usual time for the cleanup after the first signal.
    more_time = "from registry.cli import interrupts\ninterrupts.CLEANUP_SECONDS = 600.0"
    with (
        holding(tmp_path / "data" / "locks" / "metadata"),
        running_command(tmp_path, "group", "add", "dev", first_lines=more_time) as process,
    ):
        until(lambda: is_waiting_for_lock(process), process)
        process.send_signal(numbers[0])
        until(lambda: has_received_signals(process), process)
        check_interrupt(process, numbers[1])
