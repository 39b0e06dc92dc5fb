"""Connections of both HTTP libraries: addresses, DNS look-ups, TLS certificates and proxies.

A name is resolved here, its addresses are checked, and the connection is made to a checked address. What the name
resolves to later does not matter.

The proxies come from HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, in upper or lower case, and are chosen here for
both libraries, so that these cannot differ. As in curl and Go, NO_PROXY lists hosts, domains, `host:port`, networks
such as `10.0.0.0/8`, or `*`. As in Go, and so in docker, loopback addresses are never proxied.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

import httpcore2
import httpx2
from urllib3 import HTTPConnectionPool, HTTPResponse, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from registry.client_addresses import is_loopback_host
from registry.single_flight import SingleFlight
from registry.upstream.destinations import AddressPolicy, Reach, origin, registrable_domain
from registry.upstream.request_limits import KeyedSemaphore
from registry.upstream.transfer import Connection
from storage.errors import UpstreamUnavailable

RESOLVER_THREADS = 64
"""Look-ups at a time for one upstream; threads start as they are needed. One repository cannot use them all: it has 16
requests at a time, each for at most 10 s, and a look-up of the operating system takes at most about 30 s."""
RESOLVER_THREADS_PER_DOMAIN = 2
"""Look-ups at a time for names of one registrable domain."""
RESOLVER_WAIT_SECONDS = 10.0
"""Longest wait of a look-up for its domain's threads. The request that needs it has timed out by then."""
NEXT_ADDRESS_SECONDS = 1.0
"""Time until the next address of a host is tried, while the previous one does not respond."""

SocketOption = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]
OnConnection = Callable[[Connection, str | None], None]


class PeerStream(httpcore2.AsyncNetworkStream):
    """A connection that remembers the address of its peer, also after it is closed."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream, peer: Any) -> None:
        self._stream = stream
        self._peer = peer

    @classmethod
    def of(cls, stream: httpcore2.AsyncNetworkStream, peer: Any) -> PeerStream:
        """Wraps a new connection, which then receives no more than is read."""
        _receive_in_portions(stream)
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
        timeout: float | None = None,  # noqa: ASYNC109  httpcore2's
    ) -> httpcore2.AsyncNetworkStream:
        return PeerStream(await self._stream.start_tls(ssl_context, server_hostname, timeout), self._peer)

    def get_extra_info(self, info: str) -> Any:
        return self._peer if info == "server_addr" else self._stream.get_extra_info(info)


def _receive_in_portions(stream: httpcore2.AsyncNetworkStream) -> None:
    """Pauses the connection after each portion until the reader wants more. The event loop receives up to 32 portions
    of 256 KiB at once from a fast sender before any reader can pause it: with 200 requests, that is all of the memory.

    httpcore2 and anyio have no API for this, so it uses private attributes of theirs. If these change, the first test
    fails with an AttributeError.
    """
    raw: Any = stream._stream  # type: ignore[attr-defined]
    transport, protocol = raw._transport, raw._protocol
    received = protocol.data_received

    def data_received(data: bytes) -> None:
        received(data)
        if not transport.is_closing():
            transport.pause_reading()

    protocol.data_received = data_received
    transport.set_protocol(protocol)  # uvloop caches the method it looked up before


class Resolver:
    """Resolves the names that one upstream's redirects and challenges lead to, in threads of its own. Concurrent
    look-ups of a name share one thread. Few look-ups run at a time for one registrable domain: a repository can lead to
    any name, and slow names must leave threads for others."""

    def __init__(self, name: str) -> None:
        self._threads = ThreadPoolExecutor(RESOLVER_THREADS, f"resolve-{name}")
        self._limit = KeyedSemaphore(RESOLVER_THREADS_PER_DOMAIN)
        self._flights: SingleFlight[list[str]] = SingleFlight()

    async def resolve(self, host: str, port: int) -> list[str]:
        """Returns a host's addresses. Raises OSError. When the caller is cancelled, the look-up goes on for others."""
        return await self._flights.run((host, port), lambda: self._look_up(host, port))

    async def _look_up(self, host: str, port: int) -> list[str]:
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(RESOLVER_WAIT_SECONDS):
                    await stack.enter_async_context(self._limit.acquire(registrable_domain(host)))
            except TimeoutError:
                raise OSError("other names of its domain resolve slowly") from None
            return await asyncio.get_running_loop().run_in_executor(self._threads, resolve_host, host, port)

    async def aclose(self) -> None:
        """Stops without waiting for threads. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._flights.aclose()


class CheckedBackend(httpcore2.AnyIOBackend):
    """The network backend of httpx2: connects to checked addresses."""

    def __init__(self, policy: AddressPolicy, reach: Reach, resolver: Resolver) -> None:
        self._policy = policy
        self._reach = reach
        self._resolver = resolver

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore2's
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        if self._reach.is_unrestricted(host, port):
            stream = await super().connect_tcp(host, port, timeout, local_address, socket_options)
            return PeerStream.of(stream, stream.get_extra_info("server_addr"))
        try:
            async with asyncio.timeout(timeout):
                found = await self._resolver.resolve(host, port)
                addresses = self._policy.allowed_addresses(self._reach, host, port, found)
                return await self._first(addresses, port, local_address, socket_options)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error

    async def _first(
        self,
        addresses: list[str],
        port: int,
        local_address: str | None,
        socket_options: Iterable[SocketOption] | None,
    ) -> httpcore2.AsyncNetworkStream:
        """Returns a connection to the first address that responds."""
        for address in addresses:
            last = address == addresses[-1]
            try:
                wait = None if last else NEXT_ADDRESS_SECONDS
                stream = await super().connect_tcp(address, port, wait, local_address, socket_options)
                return PeerStream.of(stream, (address, port))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if last:
                    raise
        raise OSError("the name has no address")


class CheckedTransport(httpx2.AsyncHTTPTransport):
    """The transport of httpx2 without a proxy, on a `CheckedBackend`."""

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


def resolve_host(host: str, port: int) -> list[str]:
    """Returns a host's addresses. Blocking. Raises OSError."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError("the name is not valid") from None
    return list(dict.fromkeys(str(each[4][0]) for each in found))


class _CheckedConnection(HTTPConnection):
    """A urllib3 connection to checked addresses. Calls `on_connection` in the requesting thread with the socket that
    the response is read from, and the address of its peer (None: through a proxy)."""

    policy: AddressPolicy
    reach: Reach
    on_connection: OnConnection
    peer: str | None = None

    def _new_conn(self) -> socket.socket:
        host, port = self._dns_host, self.port or 0
        if self.proxy is not None:
            return super()._new_conn()
        made = super()._new_conn() if self.reach.is_unrestricted(host, port) else self._to_checked(host, port)
        self.peer = made.getpeername()[0]
        return made

    def _to_checked(self, host: str, port: int) -> socket.socket:
        try:
            addresses = resolve_host(host, port)
        except socket.gaierror as error:
            raise NameResolutionError(host, self, error) from error
        except OSError as error:
            raise NewConnectionError(self, str(error)) from error
        addresses = self.policy.allowed_addresses(self.reach, host, port, addresses)
        try:
            for address in addresses:
                self._dns_host = address
                try:
                    return super()._new_conn()
                except (NewConnectionError, ConnectTimeoutError):
                    if address == addresses[-1]:
                        raise
        finally:
            self._dns_host = host  # the certificate is checked against the name
        raise NewConnectionError(self, "the name has no address")

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        if self.sock is not None:
            self.on_connection(self.sock, self.peer)
        return super().getresponse()


def pool_classes(
    policy: AddressPolicy, reach: Reach, on_connection: OnConnection
) -> dict[str, type[HTTPConnectionPool]]:
    """Returns the value for `PoolManager.pool_classes_by_scheme`. An exception of `on_connection` ends the request."""
    attributes = {"policy": policy, "reach": reach, "on_connection": staticmethod(on_connection)}
    plain = type("Plain", (_CheckedConnection,), attributes)
    secure = type("Secure", (_CheckedConnection, HTTPSConnection), attributes)
    return {
        "http": type("PlainPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("SecurePool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
    }


log = logging.getLogger("registry.upstream")


class TrustStore:
    """One TLS context for both HTTP libraries: the system's certificates, or those in `ca_file` instead. Created at the
    first https request. Always verifies."""

    def __init__(self, ca_file: Path | None) -> None:
        self._ca_file = ca_file
        self._context: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def context(self) -> ssl.SSLContext:
        """Returns the context. Raises UpstreamUnavailable if `ca_file` cannot be read; the log says why. Blocks for
        about 30 ms at the first call."""
        with self._lock:
            if self._context is None:
                self._context = self._read()
            return self._context

    def _read(self) -> ssl.SSLContext:
        if self._ca_file is None:
            return httpx2.create_ssl_context()
        try:
            return ssl.create_default_context(cafile=str(self._ca_file))
        except OSError as error:  # ssl.SSLError is one
            log.error("the certificates in %s cannot be read: %s", self._ca_file, error)
            raise UpstreamUnavailable("the upstream's ca_file cannot be read; the server's log says why") from None


class OutboundProxies:
    """The proxies of the environment, read once."""

    def __init__(self) -> None:
        self._by_scheme = getproxies_environment()
        self._no_proxy = [entry.strip().lower() for entry in self._by_scheme.get("no", "").split(",") if entry.strip()]

    def proxy_for(self, url: str) -> str | None:
        """Returns the proxy's URL for a request; None: no proxy. Raises UpstreamUnavailable for an unsupported kind of
        proxy."""
        scheme, host, port = origin(url)
        proxy = self._by_scheme.get(scheme) or self._by_scheme.get("all")
        if not proxy or is_loopback_host(host) or any(_matches_no_proxy(entry, host, port) for entry in self._no_proxy):
            return None
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        if urlsplit(proxy).scheme not in ("http", "https"):
            raise UpstreamUnavailable(
                f"the environment names a {urlsplit(proxy).scheme} proxy; only http and https proxies are supported"
            )
        return proxy


def _matches_no_proxy(entry: str, host: str, port: int) -> bool:
    """Returns whether an entry of NO_PROXY applies to the host."""
    if entry == "*":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name, colon, number = entry.rpartition(":")
        name = (name if colon and number.isdigit() else entry).lstrip("*").lstrip(".")
        if colon and number.isdigit() and int(number) != port:
            return False
        return bool(name) and (host == name or host.endswith(f".{name}"))
    try:
        return address in ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        shown = f"[{host}]" if ":" in host else host
        return entry in (f"{shown}:{port}", shown)  # ignores entries that cannot be parsed, as curl and Go do
