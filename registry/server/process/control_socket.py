"""The control socket: a Unix socket over which commands on the same machine, such as `entrepot reload`, send requests
to a running server.

The socket is a file in the data directory. Only the owner of the file and root can connect to the socket. On each
connection, the client sends one request, a line of JSON such as `{"do": "reload"}`. When the requested action has
ended, the server sends one answer, the line `{"ok": true, "message": "…"}`. If the client disconnects before that, the
action continues.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from registry.server.process.live_change import ChangeOutcome, Reply
from registry.server.server_log import log

_MAX_CONNECTIONS = 32
"""Largest number of open connections to the socket. The server closes further connections immediately."""
_MAX_REQUEST_BYTES = 4096
"""Longest request. The server closes a connection on which it receives more bytes without an end of line."""

Action = Callable[[Reply], None]
"""A function that starts a requested action, such as a reload of the settings. The function may return before the
action has ended. Its argument is a `Reply`. When the action has ended, the `Reply` is called with the outcome of the
action, and sends the outcome to the client."""
Watch = Callable[[socket.socket, Callable[[], None]], None]
"""A function that makes the event loop call the second argument whenever the first argument, a socket, is readable."""
Unwatch = Callable[[socket.socket], None]
"""A function that undoes a call of a `Watch` for this socket."""


class ControlUnavailable(Exception):
    """No server can be reached over the socket, or the server ended before it sent an answer. `message`: the reason, in
    one line."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)


def listen_for_control(path: Path) -> socket.socket | None:
    """Creates the control socket at `path` and listens on it. If another server listens at `path`, or if the socket
    cannot be created, logs a warning and returns None. Commands cannot reach this server then. If no server listens at
    `path` any more, replaces the old file."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            address = _address(directory, path)
            if _has_listener(address):
                log.warning(
                    "another server uses this data directory: reload and restart commands reach only that server"
                )
                sock.close()
                return None
            with suppress(FileNotFoundError):
                os.unlink(path)
            # `bind` creates the file with mode 0600, so only the owner and root can ever connect.
            old_mask = os.umask(0o177)
            try:
                sock.bind(address)
            finally:
                os.umask(old_mask)
        finally:
            os.close(directory)
        sock.listen(_MAX_CONNECTIONS)
    except OSError as error:
        log.warning("commands cannot reach this server: %s: %s", path, error.strerror or error)
        sock.close()
        return None
    return sock


def file_identity(path: Path) -> tuple[int, int] | None:
    """Returns the device and the inode number of the file at `path`. They differ after another server has replaced the
    file by its own socket. Returns None if the file does not exist or cannot be examined."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def remove_socket_file(path: Path, identity: tuple[int, int] | None) -> None:
    """Removes the file of the socket. Does nothing if the file does not exist, or if another server has replaced the
    file by its own socket. `identity`: what `file_identity` returned after the socket was created. Call this function
    before you close the socket: another server can replace the file only after the socket is closed."""
    if identity is not None and identity == file_identity(path):
        with suppress(OSError):
            os.unlink(path)


def ask_server(path: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Sends a request to the server whose control socket is at `path`, and returns the server's answer. Raises
    ControlUnavailable.

    Does not follow a symbolic link at `path`. Otherwise the owner of the data directory could make a command of root
    send its request to another program's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            file = os.open(path, os.O_PATH | os.O_NOFOLLOW)
            try:
                sock.connect(f"/proc/self/fd/{file}")
            finally:
                os.close(file)
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as stream:
                line = stream.readline()
        except (FileNotFoundError, ConnectionRefusedError):
            raise ControlUnavailable(f"no server uses the data directory {path.parent}") from None
        except OSError as error:
            advice = _user_advice(path) if isinstance(error, PermissionError) else ""
            raise ControlUnavailable(f"cannot reach the server at {path}: {error.strerror or error}{advice}") from None
    if not line.endswith(b"\n"):
        raise ControlUnavailable("the server ended before it had answered")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _user_advice(path: Path) -> str:
    """Returns the end of an error message for a user who is not allowed to use the socket at `path`. This text says
    which user is allowed to use the socket. Returns an empty text if this process runs as that user. Root gets this
    text too in a container without the capability CAP_DAC_OVERRIDE."""
    for file in (path, path.parent):
        with suppress(OSError):  # raised if this user may not enter a directory above `file`
            owner = os.stat(file, follow_symlinks=False).st_uid
            return "" if owner == os.geteuid() else f"; run the command as the user with uid {owner}"
    return "; run the command as the user who runs the server"


def _address(directory: int, path: Path) -> str:
    """Returns the address of the socket at `path`. `directory`: an open descriptor of the socket's directory. An
    address may have only 107 bytes (unix(7)), so the address for a long path names the directory by the descriptor."""
    text = str(path)
    # 100 leaves a small margin below 107.
    return text if len(os.fsencode(text)) < 100 else f"/proc/self/fd/{directory}/{path.name}"


def _has_listener(address: str) -> bool:
    """Returns whether a server accepts connections at the address."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address)
        except BlockingIOError:  # a server listens, but its queue of new connections is full
            return True
        except OSError:
            return False
    return True


class ControlSocket:
    """The server's end of the control socket. Runs in the event loop of the process that owns the listening socket."""

    def __init__(
        self, listener: socket.socket, path: Path, actions: Mapping[str, Action], watch: Watch, unwatch: Unwatch
    ) -> None:
        """`path`: the file of the listening socket. `actions`: the action for each name that a request can have in the
        field `do`."""
        self.listener = listener
        self._path = path
        self._identity = file_identity(path)
        self._actions = actions
        self._watch = watch
        self._unwatch = unwatch
        self._partial_requests: dict[socket.socket, bytearray] = {}  # connection -> the received part of its request
        self._waiting: set[socket.socket] = set()  # connections that wait for their answer
        watch(listener, self._accept)

    @property
    def waiting_connections(self) -> list[socket.socket]:
        """The connections that wait for their answer."""
        return list(self._waiting)

    def add_waiting_connection(self, connection: socket.socket) -> Reply:
        """Adds `connection` to `waiting_connections`. The server must have received the whole request. Returns the
        function that sends the answer and closes the connection."""
        self._waiting.add(connection)

        def reply(outcome: ChangeOutcome) -> None:
            self._waiting.discard(connection)
            line = json.dumps({"ok": outcome.ok, "message": outcome.message}).encode() + b"\n"
            with connection, suppress(OSError):  # raised if the client has disconnected
                connection.send(line)

        return reply

    def close(self) -> None:
        """Removes the file of the socket, unless the file belongs to another server. Closes the socket and all
        connections."""
        remove_socket_file(self._path, self._identity)
        self._unwatch(self.listener)
        for connection in self._partial_requests:
            self._unwatch(connection)
        for sock in (*self._partial_requests, *self._waiting, self.listener):
            sock.close()
        self._partial_requests.clear()
        self._waiting.clear()

    def _accept(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError:
            return
        if len(self._partial_requests) + len(self._waiting) >= _MAX_CONNECTIONS:
            connection.close()
            return
        connection.setblocking(False)
        self._partial_requests[connection] = bytearray()
        self._watch(connection, lambda: self._receive(connection))

    def _receive(self, connection: socket.socket) -> None:
        """Reads from a connection. Starts the requested action when the whole line is received. Closes the connection
        if the client ends it before the end of the line, or if the line is too long."""
        try:
            data = connection.recv(_MAX_REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        received = self._partial_requests[connection]
        received += data
        if data and b"\n" not in received and len(received) <= _MAX_REQUEST_BYTES:
            return
        self._unwatch(connection)
        del self._partial_requests[connection]
        if b"\n" not in received:
            connection.close()
            return
        reply = self.add_waiting_connection(connection)
        action = self._actions.get(_requested_action(bytes(received)))
        if action is None:
            reply(ChangeOutcome(False, f"unknown request; this server knows the requests {', '.join(self._actions)}"))
        else:
            action(reply)


def _requested_action(line: bytes) -> str:
    """Returns the name of the requested action. Returns an empty text if `line` is not a valid request."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):  # RecursionError: the line has deeply nested lists
        return ""
    return str(request.get("do", "")) if isinstance(request, dict) else ""
