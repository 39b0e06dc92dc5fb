"""Connections of httpx2 for small requests: to the API of a registry, to token services and to webhooks.

`CheckedTransport` connects only to allowed addresses (`registry.upstream.transport` says why). `ProxiedTransport`
connects to a proxy. Both transports use connections of the class `PeerStream`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Coroutine, Iterable
from typing import Any

import httpcore2
import httpx2

from registry.upstream.destinations import AddressPolicy, Reach
from registry.upstream.transport import Resolver

ADDRESS_ATTEMPT_SECONDS = 1.0
"""Time limit for an attempt to connect to one address of a host (`_connect_to_any`). The attempt to connect to the last
address of the host does not have this limit."""
SocketOption = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]


class PeerStream(httpcore2.AsyncNetworkStream):
    """A connection of httpx2. `get_extra_info("server_addr")` returns `peer`, even after the connection is closed. All
    other calls go to `stream`."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream, peer: Any) -> None:
        """`peer`: the IP address and the port of the server. None if the connection is to a proxy, or if the server has
        already closed the connection."""
        self._stream = stream
        self._peer = peer

    @classmethod
    def wrap(cls, stream: httpcore2.AsyncNetworkStream, peer: Any) -> PeerStream:
        """Calls `_pause_after_each_receive` for the new TCP connection `stream`, and returns the connection as a
        PeerStream."""
        _pause_after_each_receive(stream)
        return cls(stream, peer)

    def read(self, max_bytes: int, timeout: float | None = None) -> Coroutine[Any, Any, bytes]:
        return self._stream.read(max_bytes, timeout)

    def write(self, buffer: bytes, timeout: float | None = None) -> Coroutine[Any, Any, None]:
        return self._stream.write(buffer, timeout)

    def aclose(self) -> Coroutine[Any, Any, None]:
        return self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore2's signature
    ) -> httpcore2.AsyncNetworkStream:
        return PeerStream(await self._stream.start_tls(ssl_context, server_hostname, timeout), self._peer)

    def get_extra_info(self, info: str) -> Any:
        return self._peer if info == "server_addr" else _extra_info(self._stream, info)


def _extra_info(stream: httpcore2.AsyncNetworkStream, info: str) -> Any:
    """Returns `stream.get_extra_info(info)`. If anyio raises an error, returns True for `is_readable`, and None for any
    other `info`.

    anyio raises AttributeError or ValueError for a connection that uvloop has closed after an error. Before each
    request, the connection pool asks its idle connections for `is_readable`. The pool discards a connection for which
    the answer is True. An error would make the request fail."""
    try:
        return stream.get_extra_info(info)
    except (AttributeError, ValueError, OSError):
        return True if info == "is_readable" else None


def _pause_after_each_receive(stream: httpcore2.AsyncNetworkStream) -> None:
    """Limits the received bytes that wait in memory: after each read from the socket, the connection stops reading
    until its user asks for more bytes. Without the limit, up to 32 reads of 256 KiB would wait for each connection.

    httpcore2 and anyio have no public API for this limit, so the function uses their private attributes. If these
    attributes change, any test that opens a connection fails with an AttributeError.
    """
    raw: Any = stream._stream  # type: ignore[attr-defined]
    transport, protocol = raw._transport, raw._protocol
    receive = protocol.data_received

    def data_received(data: bytes) -> None:
        receive(data)
        if not transport.is_closing():
            transport.pause_reading()

    protocol.data_received = data_received
    transport.set_protocol(protocol)  # uvloop has cached the previous `data_received`


class CheckedBackend(httpcore2.AnyIOBackend):
    """Makes TCP connections to allowed addresses for httpx2. `reach`: the allowed addresses. `policy`: checks the
    addresses of a host against `reach`. `resolver`: looks up the addresses of a host."""

    def __init__(self, policy: AddressPolicy, reach: Reach, resolver: Resolver) -> None:
        self._policy = policy
        self._reach = reach
        self._resolver = resolver

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore2's signature
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        if self._reach.is_unrestricted(host, port):
            stream = await super().connect_tcp(host, port, timeout, local_address, socket_options)
            return PeerStream.wrap(stream, _extra_info(stream, "server_addr"))
        try:
            async with asyncio.timeout(timeout):
                resolved = await self._resolver.resolve(host, port)
                addresses = self._policy.allowed_addresses(self._reach, host, port, resolved)
                return await self._connect_to_any(addresses, port, local_address, socket_options)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error

    async def _connect_to_any(
        self,
        addresses: list[str],
        port: int,
        local_address: str | None,
        socket_options: Iterable[SocketOption] | None,
    ) -> httpcore2.AsyncNetworkStream:
        """Tries to connect to one IP address after another, and returns the first connection. If all attempts fail,
        raises the error of the last attempt. Raises OSError if `addresses` is empty."""
        for address in addresses:
            is_last = address == addresses[-1]
            try:
                timeout = None if is_last else ADDRESS_ATTEMPT_SECONDS
                stream = await super().connect_tcp(address, port, timeout, local_address, socket_options)
                return PeerStream.wrap(stream, (address, port))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if is_last:
                    raise
        raise OSError("the name has no address")


class CheckedTransport(httpx2.AsyncHTTPTransport):
    """The transport of httpx2 for requests without a proxy. It makes its connections with `CheckedBackend`."""

    def __init__(
        self, policy: AddressPolicy, reach: Reach, resolver: Resolver, context: ssl.SSLContext, limits: httpx2.Limits
    ) -> None:
        super().__init__(verify=context, trust_env=False, limits=limits)
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=context,
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=CheckedBackend(policy, reach, resolver),
        )


class _ProxiedBackend(httpcore2.AnyIOBackend):
    """Makes TCP connections to a proxy for httpx2."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore2's signature
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        return PeerStream(await super().connect_tcp(host, port, timeout, local_address, socket_options), None)


class ProxiedTransport(httpx2.AsyncHTTPTransport):
    """The transport of httpx2 for requests through the proxy at the URL `proxy`. The `peer` of its connections is
    None."""

    def __init__(self, proxy: str, context: ssl.SSLContext, limits: httpx2.Limits) -> None:
        is_https = proxy.startswith("https:")
        super().__init__(
            verify=context,
            trust_env=False,
            limits=limits,
            proxy=httpx2.Proxy(proxy, ssl_context=context if is_https else None),
        )
        self._pool._network_backend = _ProxiedBackend()
        _close_failed_tunnels(self._pool)


def _close_failed_tunnels(pool: Any) -> None:
    """Changes the connection pool `pool` of a proxy. If the TLS handshake with an https server fails or is cancelled,
    the pool then closes the tunnel to the server. httpcore2 itself would count this tunnel as a connection in use for
    ever. After `max_connections` such tunnels, all later requests would wait for ever."""
    create = pool.create_connection

    def create_connection(target: httpcore2.Origin) -> Any:
        connection = create(target)
        if target.scheme != b"https":
            return connection
        send = connection.handle_async_request

        async def handle_async_request(request: httpcore2.Request) -> httpcore2.Response:
            try:
                response: httpcore2.Response = await send(request)
            except BaseException:
                if not connection._connected:
                    await connection.aclose()
                raise
            return response

        connection.handle_async_request = handle_async_request
        return connection

    pool.create_connection = create_connection
