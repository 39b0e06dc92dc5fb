"""Sends commands from the supervisor (the parent process) to a worker, over a pair of connected sockets. The sockets
keep the boundaries between messages (SOCK_SEQPACKET).

A command is the line `NUMBER NAME`. If the command has a payload, the descriptor of an anonymous file with the payload
is sent with the line, so that a large payload takes no space in the socket's buffer. The worker runs its commands one
after another, and answers each with `NUMBER ok` or `NUMBER failed REASON`. NUMBER shows which command an answer belongs
to, because an answer can arrive after the supervisor has stopped waiting for it.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from registry.server.server_log import log

_MAX_MESSAGE_BYTES = 8192
"""Largest size of a command line or an answer, in bytes."""

CommandHandler = Callable[[str, bytes], Awaitable[None]]
"""Runs the command with the given name and payload. The payload is empty if the command has none. Raises an exception
if the command fails."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A worker's answer to the command with this `number`. `failure`: why the command failed, or None if it
    succeeded."""

    number: int
    failure: str | None


def command_pair() -> tuple[socket.socket, socket.socket]:
    """Returns two connected non-blocking sockets: the supervisor's and the worker's."""
    supervisor_end, worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    supervisor_end.setblocking(False)
    worker_end.setblocking(False)
    return supervisor_end, worker_end


def send_command(sock: socket.socket, number: int, name: str, payload: bytes | None = None) -> None:
    """Sends a command. Raises OSError if the worker has ended, or if the socket's buffer is full of commands that the
    worker has not read yet."""
    if payload is None:
        sock.send(f"{number} {name}".encode())
        return
    descriptor = os.memfd_create("command-payload")
    try:
        with open(descriptor, "wb", closefd=False) as stream:
            stream.write(payload)
        socket.send_fds(sock, [f"{number} {name}".encode()], [descriptor])
    finally:
        os.close(descriptor)


def receive_answer(sock: socket.socket) -> Answer | None:
    """Returns the next answer, or None if the worker has ended. Raises BlockingIOError if no answer has arrived yet."""
    try:
        data = sock.recv(_MAX_MESSAGE_BYTES)
    except ConnectionError:
        return None
    if not data:
        return None
    number, result, *reason = data.decode(errors="replace").split(" ", 2)
    return Answer(int(number), None if result == "ok" else " ".join(reason))


class CommandReceiver:
    """The worker's end of the sockets: receives commands and runs them in the order in which they were sent."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, handler: CommandHandler) -> None:
        self._loop = loop
        self._sock = sock
        self._handler = handler
        self._commands: asyncio.Queue[tuple[int, str, bytes]] = asyncio.Queue()
        self._task = loop.create_task(self._run_commands(), name="commands of the supervisor")
        loop.add_reader(sock, self._receive)

    def close(self) -> None:
        """Stops receiving and running commands. If a command is running, cancels the command and sends no answer."""
        self._loop.remove_reader(self._sock)
        self._task.cancel()
        self._sock.close()

    def _receive(self) -> None:
        """Queues the command that has arrived. Called when the socket is readable."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._sock, _MAX_MESSAGE_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:  # the supervisor has ended; `Worker` notices this by its `alive_pipe`, and exits
            self._loop.remove_reader(self._sock)
            return
        number, name = data.decode().split(" ", 1)
        self._commands.put_nowait((int(number), name, b"".join(map(_read_and_close, descriptors))))

    async def _run_commands(self) -> None:
        while True:
            number, name, payload = await self._commands.get()
            try:
                await self._handler(name, payload)
                answer = f"{number} ok"
            except Exception as error:
                answer = f"{number} failed {_reason(error)}"
            with suppress(OSError):
                self._sock.send(answer.encode()[:_MAX_MESSAGE_BYTES])


def _read_and_close(descriptor: int) -> bytes:
    with open(descriptor, "rb") as stream:
        stream.seek(0)
        return stream.read()


def _reason(error: Exception) -> str:
    """Returns one line that says why a command failed. If the error is unexpected, logs its traceback. An OSError, and
    an error with a `message`, are expected."""
    message = getattr(error, "message", None)
    if not (isinstance(message, str) and message):
        if not isinstance(error, OSError):
            log.error("a command of the supervisor failed", exc_info=error)
        message = str(error) or type(error).__name__
    return " ".join(message.split())
