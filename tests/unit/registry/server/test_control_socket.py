"""The control socket of a server: commands such as `entrepot reload` send their requests to it."""

from __future__ import annotations

import os
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from registry.server.process.control_socket import (
    Action,
    ControlSocket,
    ControlUnavailable,
    ask_server,
    listen_for_control,
)
from registry.server.process.live_change import ChangeOutcome


@contextmanager
def serve(path: Path, actions: dict[str, Action]) -> Iterator[None]:
    """Serves the socket at `path` in a thread."""
    listener = listen_for_control(path)
    assert listener is not None
    selector, stop = selectors.DefaultSelector(), socket.socketpair()

    def watch(sock: socket.socket, callback: Callable[[], None]) -> None:
        selector.register(sock, selectors.EVENT_READ, callback)

    control = ControlSocket(listener, path, actions, watch, lambda sock: selector.unregister(sock) and None)
    is_stopped = threading.Event()
    watch(stop[0], is_stopped.set)

    def loop() -> None:
        while not is_stopped.is_set():
            for key, _ in selector.select():
                key.data()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        stop[1].send(b".")
        thread.join()
        control.close()
        selector.close()
        for end in stop:
            end.close()


NOBODY = 65534
"""The uid of a user who owns no files."""
ACTIONS: dict[str, Action] = {
    "reload": lambda reply: reply(ChangeOutcome(True, "done")),
    "restart": lambda reply: reply(ChangeOutcome(False, "no")),
}


def test_each_request_gets_the_outcome_of_its_action(tmp_path: Path) -> None:
    """Each request gets the outcome of its action. An unknown request is refused, with a list of the known requests."""
    path = tmp_path / "control"
    with serve(path, ACTIONS):
        assert ask_server(path, {"do": "reload"}) == {"ok": True, "message": "done"}
        assert ask_server(path, {"do": "restart"}) == {"ok": False, "message": "no"}
        message = "unknown request; this server knows the requests reload, restart"
        assert ask_server(path, {"do": "dance"}) == {"ok": False, "message": message}
        assert ask_server(path, {}) == {"ok": False, "message": message}


def test_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    """The control socket works even if its path is too long for a socket address. Without a server, the client gets an
    error that says so."""
    path = tmp_path / ("d" * 120) / "control"
    path.parent.mkdir()
    with serve(path, ACTIONS):
        assert ask_server(path, {"do": "reload"})["ok"]
    with pytest.raises(ControlUnavailable, match="no server uses the data directory"):
        ask_server(path, {"do": "reload"})
    with serve(path, ACTIONS):  # replaces the file of the previous socket
        assert ask_server(path, {"do": "reload"})["ok"]


def test_a_link_in_place_of_the_socket_is_not_followed(tmp_path: Path) -> None:
    """Root may send a request to the control socket of another user. If this user puts a symbolic link in place of the
    socket, the program at its target does not get the request."""
    with serve(tmp_path / "control", ACTIONS):
        (tmp_path / "link").symlink_to(tmp_path / "control")
        with pytest.raises(ControlUnavailable):
            ask_server(tmp_path / "link", {"do": "reload"})


@contextmanager
def as_another_user(path: Path) -> Iterator[None]:
    """Runs the block in the directory of `path`, as a user who may not use the socket at `path`. Only root can become
    another user. Without root's rights, nobody may use the socket, and `os.geteuid` returns the uid of another user."""
    path.parent.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)  # the other user may not enter the directories above it
        if os.geteuid() == 0:
            os.seteuid(NOBODY)
        else:
            path.chmod(0)
            patch.setattr(os, "geteuid", lambda: NOBODY)
        try:
            yield
        finally:
            if os.getuid() == 0:
                os.seteuid(0)


def test_a_user_without_the_right_is_told_which_user_has_it(tmp_path: Path) -> None:
    """A user who may not use the socket learns whose socket it is: in a container without CAP_DAC_OVERRIDE, root does
    not have the right either."""
    owner = os.geteuid()
    path = tmp_path / "control"
    with serve(path, ACTIONS), as_another_user(path), pytest.raises(ControlUnavailable) as refused:
        ask_server(Path("control"), {"do": "reload"})
    assert refused.value.message.endswith(f": Permission denied; run the command as the user with uid {owner}")


@pytest.mark.parametrize("answer", [b"", b'{"ok": tr', b'{"ok": true, "message": "done"}'])
def test_a_server_that_ends_while_it_answers(tmp_path: Path, answer: bytes) -> None:
    """If the server ends before it has sent its whole answer, the client gets an error that says so."""
    path = tmp_path / "control"

    def answer_partly(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = threading.Thread(target=answer_partly, args=(listener,))
        server.start()
        with pytest.raises(ControlUnavailable, match="ended before it had answered"):
            ask_server(path, {"do": "reload"})
        server.join()


def test_a_second_server_does_not_take_over_the_socket(tmp_path: Path) -> None:
    """A second server cannot take over the control socket of a running server."""
    path = tmp_path / "control"
    with serve(path, ACTIONS):
        assert listen_for_control(path) is None
        assert ask_server(path, {"do": "reload"})["ok"]


@pytest.mark.parametrize("data", [b"", b"no line", b"\xff\n", b"[]\n", b"x" * 5000 + b"\n", b"[" * 4000 + b"\n"])
def test_the_socket_works_after_malformed_requests(tmp_path: Path, data: bytes) -> None:
    """A malformed request gets an error or a closed connection. The socket keeps working."""
    path = tmp_path / "control"
    with serve(path, ACTIONS):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while received := sock.recv(4096):
                answer += received
        assert answer == b"" or b'"ok": false' in answer
        assert ask_server(path, {"do": "reload"})["ok"]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_server_removes_only_its_own_socket_file(tmp_path: Path, is_replaced: bool) -> None:
    """When a server stops, it removes the file of its socket. If another file is at this path by then, it stays."""
    path = tmp_path / "control"
    with serve(path, ACTIONS):
        if is_replaced:
            path.rename(tmp_path / "elsewhere")
            path.write_text("")
    assert path.exists() is is_replaced
