"""The control socket. Over it, commands such as `entrepot reload`, run on the same machine, send requests to a running
server.

It is a Unix socket in the data directory, which only the owner of the socket and root can use. On each connection, the
client sends one request, a line of JSON such as `{"do": "reload"}`. When the work is done, the server sends one answer,
the line `{"ok": true, "message": "…"}`. If the client disconnects before that, the work goes on.
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
"""Largest number of open connections to the socket. Further connections are closed."""
_MAX_REQUEST_BYTES = 4096
"""Longest request. A connection that sends more bytes without an end of line is closed."""

Action = Callable[[Reply], None]
"""Starts the work that a request asks for. Calls its argument with the outcome, immediately or later."""
Watch = Callable[[socket.socket, Callable[[], None]], None]
"""Makes the event loop call the function when the socket is readable."""
Unwatch = Callable[[socket.socket], None]
"""Makes the event loop stop watching the socket."""


class ControlUnavailable(Exception):
    """No server can be reached over the socket, or the server ended before it answered. `message` says why, in one
    line."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)


def listen_for_control(path: Path) -> socket.socket | None:
    """Creates the socket at `path` and listens on it. Replaces the file of an old socket on which no server listens any
    more. Returns None, and logs a warning, if another server is listening there or the socket cannot be created: then
    commands cannot reach this server, but it can still serve clients."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            address = _address(directory, path)
            if _is_used(address):
                log.warning(
                    "another server uses this data directory: reload and restart commands reach only that server"
                )
                sock.close()
                return None
            with suppress(FileNotFoundError):
                os.unlink(path)
            old_mask = os.umask(0o177)  # nobody else may connect, from the first moment on
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
    """Returns the device and the inode number of the file at `path`; None: there is no file. These numbers change when
    another server replaces the file by its own socket."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def remove_socket_file(path: Path, identity: tuple[int, int] | None) -> None:
    """Removes the file of the socket. Does nothing if the file does not exist, or if another server has replaced it by
    its own socket. `identity`: what `file_identity` returned after the socket was created. Call this before the socket
    is closed: as long as the socket listens, no other server replaces the file."""
    if identity is not None and identity == file_identity(path):
        with suppress(OSError):
            os.unlink(path)


def ask_server(path: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Sends a request to the server whose control socket is at `path`, waits for the answer and returns it. Does not
    follow a symbolic link at `path`. The owner of the data directory could create such a link to another program's
    socket, and root, who may call this function, would send the request to that program. Raises ControlUnavailable."""
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
    """Returns the end of the error message for a user who may not use the socket at `path`. It names the user who may
    use the socket. Root may need this advice too, in a container without the capability CAP_DAC_OVERRIDE. Returns an
    empty text if this process already runs as that user."""
    for file in (path, path.parent):
        with suppress(OSError):  # this user may not enter a directory above `file`
            owner = os.stat(file, follow_symlinks=False).st_uid
            return "" if owner == os.geteuid() else f"; run the command as the user with uid {owner}"
    return "; run the command as the user who runs the server"


def _address(directory: int, path: Path) -> str:
    """Returns an address for the socket at `path`. `directory` is the open directory that contains it. An address may
    have only 107 bytes (unix(7)), so the address of a socket with a long path contains the directory's descriptor
    instead of the path."""
    text = str(path)
    # 100 leaves a small margin below 107.
    return text if len(os.fsencode(text)) < 100 else f"/proc/self/fd/{directory}/{path.name}"


def _is_used(address: str) -> bool:
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
        """`path`: the file of the listening socket. `actions`: the actions that a request can name in `do`."""
        self.listener = listener
        self._path = path
        self._identity = file_identity(path)
        self._actions = actions
        self._watch = watch
        self._unwatch = unwatch
        self._received: dict[socket.socket, bytearray] = {}  # connections whose request is not complete
        self._waiting: set[socket.socket] = set()  # connections that wait for their answer
        watch(listener, self._accept)

    @property
    def waiting(self) -> list[socket.socket]:
        """The connections that wait for their answer."""
        return list(self._waiting)

    def add_waiting(self, connection: socket.socket) -> Reply:
        """Adds to `waiting` a connection whose whole request has arrived. Returns the function that sends the answer
        and closes the connection."""
        self._waiting.add(connection)

        def reply(outcome: ChangeOutcome) -> None:
            self._waiting.discard(connection)
            line = json.dumps({"ok": outcome.ok, "message": outcome.message}).encode() + b"\n"
            with connection, suppress(OSError):  # the client has disconnected
                connection.send(line)

        return reply

    def close(self) -> None:
        """Removes the file of the socket, unless it belongs to another server. Closes the socket and its
        connections."""
        remove_socket_file(self._path, self._identity)
        self._unwatch(self.listener)
        for connection in self._received:
            self._unwatch(connection)
        for sock in (*self._received, *self._waiting, self.listener):
            sock.close()
        self._received.clear()
        self._waiting.clear()

    def _accept(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError:
            return
        if len(self._received) + len(self._waiting) >= _MAX_CONNECTIONS:
            connection.close()
            return
        connection.setblocking(False)
        self._received[connection] = bytearray()
        self._watch(connection, lambda: self._receive(connection))

    def _receive(self, connection: socket.socket) -> None:
        """Reads from a connection, and starts the action of its request once the whole line has arrived. Closes a
        connection that ends before that or sends too much."""
        try:
            data = connection.recv(_MAX_REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        received = self._received[connection]
        received += data
        if data and b"\n" not in received and len(received) <= _MAX_REQUEST_BYTES:
            return
        self._unwatch(connection)
        del self._received[connection]
        if b"\n" not in received:
            connection.close()
            return
        reply = self.add_waiting(connection)
        action = self._actions.get(_requested_action(bytes(received)))
        if action is None:
            reply(ChangeOutcome(False, f"this server does not know the request; it knows {', '.join(self._actions)}"))
        else:
            action(reply)


def _requested_action(line: bytes) -> str:
    """Returns the name of the action that a request asks for; empty if the line is not a valid request."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):  # RecursionError: the line has deeply nested lists
        return ""
    return str(request.get("do", "")) if isinstance(request, dict) else ""
