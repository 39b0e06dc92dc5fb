"""`python -m tests.fakes.fork_server DESCRIPTOR`: a process that has imported the product and forks on request.

An interpreter needs most of a second to start and to import the service. A fork of a process that has done this needs
milliseconds. Each request is a message on the socket DESCRIPTOR: a `ForkRequest` as JSON, with the stdin, stdout and
stderr of the child, and a socket for its state. The child becomes `python -m MODULE …` in a session of its own. The
fork server sends the pid and the pidfd of the child to the socket for its state, and later its exit code, as
`subprocess` counts it. The fork server ends when DESCRIPTOR is closed.

Slow steps that each child would repeat are done before the fork, or not at all. The commands of the program are built
before the fork. A child does not free its memory at its end, because it would have to copy memory that it shares with
the fork server before it could free it.

The fork server has only one thread, because a fork copies only the thread that forks. The kernel kills the children
when the fork server ends, so that killed tests leave no processes behind. The other end of the socket is in
`forked_process`.
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

MESSAGE_LIMIT = 1 << 17  # bytes
_LIBRARIES = ("registry", "storage")
_PROGRAMS = ("tests.fakes.hub.hub_api", "tests.fakes.hub.hub_server", "tests.fakes.registry_content")
"""Modules that the most frequently started fakes import."""
_LATE_IMPORTS = ("encodings.idna", "importlib.resources.readers", "typer._adapters", "typer._click.decorators")
"""Modules that libraries import only when a function is first called. Most programs call these functions."""


@dataclass(frozen=True)
class ForkRequest:
    """The program that a child runs. `env`: its whole environment. `site`: a `sitecustomize.py` to run first; empty:
    run none."""

    module: str
    args: list[str]
    cwd: str
    env: dict[str, str]
    umask: int
    site: str = ""

    def to_message(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def import_everything() -> None:
    """Imports the modules that children use, except those named `__main__`."""
    for library in _LIBRARIES:
        package = importlib.import_module(library)
        for module in pkgutil.walk_packages(package.__path__, f"{library}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    for module_name in (*_PROGRAMS, *_LATE_IMPORTS):
        importlib.import_module(module_name)


def build_commands() -> None:
    """Builds the commands of `entrepot` from their functions. Typer otherwise does this in each process."""
    from registry.cli.command import app

    build = typer.main.get_command
    built = build(app)
    typer.main.get_command = lambda typer_instance: built if typer_instance is app else build(typer_instance)


def serve(control: socket.socket) -> ForkRequest | None:
    """Receives requests from `control` and forks a child for each. Returns None when `control` is closed. In a child,
    returns the request."""
    children: dict[int, tuple[int, socket.socket]] = {}  # by pidfd: the pid, and the socket for the state
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready != control.fileno():
                poll.unregister(ready)
                _report_exit(ready, *children.pop(ready))
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
            children[pidfd] = (pid, state)
            poll.register(pidfd, select.POLLIN)


def _report_exit(pidfd: int, pid: int, state: socket.socket) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(pidfd)
    with state, contextlib.suppress(OSError):  # the process that requested the child may have ended
        state.send(str(code).encode())


def _take_over(request: ForkRequest, files: list[int]) -> None:
    """Gives a forked child the state of a newly started process: its own session, files, folder and environment. Closes
    all other files of the parent."""
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
    """Runs the program of the request in a child, and ends the child as the interpreter would. The interpreter handles
    an exception that the program does not catch, and output that cannot be written."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request.site:
        runpy.run_path(request.site)
    sys.argv = ["", *request.args]
    code = 0
    try:
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise  # the interpreter prints the value
        code = end.code or 0
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    gc.collect()  # prints warnings about files and tasks that the program left open
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
    gc.freeze()  # so that a garbage collection in a child does not write to memory that it shares with this process
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        run(request)


if __name__ == "__main__":
    main()
