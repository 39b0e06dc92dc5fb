"""Requests to OpenID providers and token issuers. `tests/system/upstream/test_reset_connections.py` has a server that
resets each connection."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from registry.auth.external.identity_http import NoUsableResponse, send_request

URL = "http://127.0.0.1:9/keys"


def raise_from_client(monkeypatch: pytest.MonkeyPatch, wrong_access: Any) -> None:
    """Makes the HTTP client call `wrong_access`, which raises AttributeError, when it sends a request."""

    async def send(*_: object, **__: object) -> httpx2.Response:
        wrong_access()
        raise AssertionError

    monkeypatch.setattr(httpx2.AsyncClient, "send", send)


async def test_a_mistake_in_the_program_is_no_reset_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """An AttributeError that a mistake in the program causes is raised as it is, so that the log has its traceback."""
    nothing: Any = None
    for wrong_access in (lambda: nothing.getpeernam, lambda: object().getpeername):  # type: ignore[attr-defined]
        raise_from_client(monkeypatch, wrong_access)
        with pytest.raises(AttributeError):
            await send_request(URL)


async def test_a_connection_without_a_socket_was_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """anyio asks a connection for the address of its other end. If uvloop has closed the connection, there is no
    socket, and the resulting AttributeError means that the server has reset the connection."""
    socket: Any = None
    raise_from_client(monkeypatch, lambda: socket.getpeername())
    with pytest.raises(NoUsableResponse, match="the server has reset the connection"):
        await send_request(URL)
