"""Tests of requests to an https upstream through a proxy that opens the tunnel, but whose tunnel leads to no working
server. Such a request must not occupy a connection of the pool for ever."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from registry.config import Upstream
from registry.upstream import api_client
from registry.upstream.api_client import ApiClient
from registry.upstream.destinations import AddressPolicy
from registry.upstream.transport import OutboundProxies, TrustStore
from storage.errors import UpstreamUnavailable
from tests.fakes.upstream_source import always, scripted_server

OPENED = b"HTTP/1.1 200 Connection established\r\n\r\n"
OPENED_AND_CLOSED = b"HTTP/1.1 200 Connection established\r\nConnection: close\r\n\r\n"
URL = "https://far.test"


@pytest.mark.parametrize("cancels", [False, True], ids=["handshake fails", "handshake is cancelled"])
async def test_failed_tunnel_frees_its_connection(monkeypatch: pytest.MonkeyPatch, cancels: bool) -> None:
    """After MAX_CONNECTIONS requests whose TLS handshake has failed, or was cancelled because the client left or the
    request took too long, the next request still gets a connection."""
    monkeypatch.setattr(api_client, "MAX_CONNECTIONS", 2)
    tunnels = 0

    async def reply(head: str) -> bytes:
        nonlocal tunnels
        is_request = head.startswith("CONNECT")
        tunnels += is_request
        return OPENED if is_request else b""

    settings = Upstream(name="far.test", endpoints=[URL])
    async with scripted_server(reply) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        if not cancels:
            proxy.reply = always(OPENED_AND_CLOSED)
        api = ApiClient(settings, OutboundProxies(), TrustStore(None), AddressPolicy("far.test"))
        try:
            for number in range(1, 6):
                if cancels:
                    request = asyncio.create_task(api.send("GET", f"{URL}/v2/", {}))
                    async with asyncio.timeout(10):
                        while tunnels < number:  # noqa: ASYNC110 - there is no event for it
                            await asyncio.sleep(0.01)
                    await asyncio.sleep(0.05)  # until the handshake has begun
                    request.cancel()
                    with suppress(asyncio.CancelledError):
                        await request
                else:
                    with pytest.raises(UpstreamUnavailable, match="cannot be reached"):
                        async with asyncio.timeout(10):
                            await api.send("GET", f"{URL}/v2/", {})
                assert proxy.connections == number
        finally:
            await api.aclose()
