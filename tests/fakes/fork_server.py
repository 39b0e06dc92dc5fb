"""`python -m tests.fakes.fork_server DESCRIPTOR`: a process that has the product imported and forks on request.

An interpreter needs most of a second to start and import the service; a fork of one that has done so needs
milliseconds. Each request is a message on the socket DESCRIPTOR: a `ForkRequest` as JSON, with the child's stdin,
stdout and stderr and a socket for its state. The child becomes `python -m MODULE …` in a session of its own. The socket
gets the child's pid with its pidfd, and later its exit code as `subprocess` counts it. The process ends when DESCRIPTOR
is closed.

What each child would do anew, and what takes most of its time, is done here once or not at all: the commands of the
program are built before the fork, and a child that has ended does not free its memory. To free what it shares with this
process would copy it first.

It has one thread, so that a fork copies all of it. The kernel kills the children when this process ends, so that tests
that are killed leave nothing behind. See `forked_process` for the other end.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass

import typer.main

from registry.server.kernel import die_with_parent

MESSAGE_LIMIT = 1 << 17
_LIBRARIES = ("registry", "storage")
_PROGRAMS = ("tests.fakes.hub.hub_api", "tests.fakes.hub.hub_server", "tests.fakes.registry_content")
"""What the fakes that are started most often import."""
_LATE = ("encodings.idna", "importlib.resources.readers", "typer._adapters", "typer._click.decorators")
"""What libraries import at the first call of a function that most programs call."""


@dataclass(frozen=True)
class ForkRequest:
    """What a child becomes. `env` is its whole environment; `site`: a `sitecustomize.py` to run first, or ""."""

    module: str
    args: list[str]
    cwd: str
    env: dict[str, str]
    umask: int
    site: str = ""

    def to_message(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def import_everything() -> None:
    """Imports what children use. Modules named `__main__` are left to them."""
    for library in _LIBRARIES:
        package = importlib.import_module(library)
        for module in pkgutil.walk_packages(package.__path__, f"{library}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    for module_name in (*_PROGRAMS, *_LATE):
        importlib.import_module(module_name)


def build_commands() -> None:
    """Builds the commands of `entrepot` from their functions, as Typer does it at each call of the program."""
    from registry.cli.command import app

    build = typer.main.get_command
    built = build(app)
    typer.main.get_command = lambda typer_instance: built if typer_instance is app else build(typer_instance)


def serve(control: socket.socket) -> ForkRequest | None:
    """Forks until `control` is closed, then returns None. Returns the request in each child."""
    waiting: dict[int, tuple[int, socket.socket]] = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready != control.fileno():
                poll.unregister(ready)
                _report_exit(ready, *waiting.pop(ready))
                continue
            message, files, _, _ = socket.recv_fds(control, MESSAGE_LIMIT, 4)
            if not message:
                return None
            request, state = ForkRequest(**json.loads(message)), socket.socket(fileno=files.pop())
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                die_with_parent(parent)
                _take_over(request, files)
                return request
            for file in files:
                os.close(file)
            pidfd = os.pidfd_open(pid)
            socket.send_fds(state, [str(pid).encode()], [pidfd])
            waiting[pidfd] = (pid, state)
            poll.register(pidfd, select.POLLIN)


def _report_exit(pidfd: int, pid: int, state: socket.socket) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(pidfd)
    with state, contextlib.suppress(OSError):  # whoever started it has gone
        state.send(str(code).encode())


def _take_over(request: ForkRequest, files: list[int]) -> None:
    """Makes a fork look like a process that was just started: no file of the parent stays open."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
    os.chdir(request.cwd)
    os.umask(request.umask)
    os.environ.clear()
    os.environ.update(request.env)
    time.tzset()
    sys.path[0] = request.cwd
    sys.stdout.reconfigure(line_buffering="PYTHONUNBUFFERED" in request.env)  # type: ignore[union-attr]


def run(request: ForkRequest) -> None:
    """Runs the program of the request in a child, and ends the child as the interpreter would. An exception that the
    program does not catch, or output that nobody takes, is left to the interpreter."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request.site:
        runpy.run_path(request.site)
    sys.argv = ["", *request.args]
    code = 0
    try:
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise  # the interpreter prints it
        code = end.code or 0
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    gc.collect()  # tells of files and tasks that the program left open
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        sys.exit(code)
    os._exit(code)


def main() -> None:
    import_everything()
    build_commands()
    gc.collect()
    gc.freeze()  # a collection in a child must not write to what it shares
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        run(request)


if __name__ == "__main__":
    main()
