"""Connections to upstreams for both HTTP libraries (httpx2 for small requests, urllib3 for blobs): DNS look-ups, checks
of addresses, TLS certificates, and proxies.

A host name is resolved here, its addresses are checked, and the connection is made to a checked address. A later
look-up of the name by a library could return another address, so the libraries get the address and not the name.

The proxies come from HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, in upper or lower case. They are chosen here, so
that both libraries use the same proxy. As in curl and Go, NO_PROXY lists hosts, domains, `host:port`, networks such as
`10.0.0.0/8`, or `*`. As in Go, and so in docker, requests to loopback addresses never use a proxy.
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
"""Concurrent look-ups for one upstream; threads start as they are needed. One repository cannot use all threads: it has
at most 16 concurrent requests of at most 10 s each, and a look-up takes the operating system at most about 30 s."""
RESOLVER_THREADS_PER_DOMAIN = 2
"""Concurrent look-ups for names of one registrable domain, such as `example.com`."""
RESOLVER_WAIT_SECONDS = 10.0
"""Longest time that a look-up waits until fewer look-ups run for its domain. The request that needs it has timed out by
then."""
NEXT_ADDRESS_SECONDS = 1.0
"""Time limit for connecting to an address of a host before the next address is tried."""

SocketOption = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]
OnConnection = Callable[[Connection, str | None], None]
"""Receives a connection, and the IP address of its peer; None: the connection goes through a proxy."""


class PeerStream(httpcore2.AsyncNetworkStream):
    """A connection that still returns the address of its peer (`server_addr`) after it is closed."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream, peer: Any) -> None:
        self._stream = stream
        self._peer = peer

    @classmethod
    def wrap(cls, stream: httpcore2.AsyncNetworkStream, peer: Any) -> PeerStream:
        """Wraps a new connection, and limits how much it receives before it is read."""
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
        timeout: float | None = None,  # noqa: ASYNC109  httpcore2's
    ) -> httpcore2.AsyncNetworkStream:
        return PeerStream(await self._stream.start_tls(ssl_context, server_hostname, timeout), self._peer)

    def get_extra_info(self, info: str) -> Any:
        return self._peer if info == "server_addr" else self._stream.get_extra_info(info)


def _pause_after_each_receive(stream: httpcore2.AsyncNetworkStream) -> None:
    """Makes the connection pause after each piece it receives, until the reader wants more. Otherwise the event loop
    would receive up to 32 pieces of 256 KiB from a fast sender before a reader could pause the connection. With 200
    concurrent requests that would fill the memory.

    httpcore2 and anyio have no public API for this, so the function uses their private attributes. If these change, any
    test that opens a connection fails with an AttributeError.
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


class Resolver:
    """Resolves the host names in redirects and challenges of one upstream, in threads of its own. Concurrent look-ups
    of the same name share one thread. Few look-ups run at a time for one registrable domain, because the upstream can
    redirect to any name, and slow names must not occupy all threads."""

    def __init__(self, upstream_name: str) -> None:
        self._threads = ThreadPoolExecutor(RESOLVER_THREADS, f"resolve-{upstream_name}")
        self._domain_limit = KeyedSemaphore(RESOLVER_THREADS_PER_DOMAIN)
        self._running_lookups: SingleFlight[list[str]] = SingleFlight()

    async def resolve(self, host: str, port: int) -> list[str]:
        """Returns the IP addresses of a host. Raises OSError. When the caller is cancelled, the look-up continues for
        other callers."""
        return await self._running_lookups.run((host, port), lambda: self._look_up(host, port))

    async def _look_up(self, host: str, port: int) -> list[str]:
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(RESOLVER_WAIT_SECONDS):
                    await stack.enter_async_context(self._domain_limit.acquire(registrable_domain(host)))
            except TimeoutError:
                raise OSError("other names of its domain resolve slowly") from None
            return await asyncio.get_running_loop().run_in_executor(self._threads, resolve_host, host, port)

    async def aclose(self) -> None:
        """Cancels look-ups that have not started; does not wait for running threads. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._running_lookups.aclose()


class CheckedBackend(httpcore2.AnyIOBackend):
    """The network backend of httpx2 that connects only to addresses that `policy` and `reach` allow."""

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
            return PeerStream.wrap(stream, stream.get_extra_info("server_addr"))
        try:
            async with asyncio.timeout(timeout):
                resolved = await self._resolver.resolve(host, port)
                addresses = self._policy.allowed_addresses(self._reach, host, port, resolved)
                return await self._connect_to_first(addresses, port, local_address, socket_options)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error

    async def _connect_to_first(
        self,
        addresses: list[str],
        port: int,
        local_address: str | None,
        socket_options: Iterable[SocketOption] | None,
    ) -> httpcore2.AsyncNetworkStream:
        """Tries the addresses in turn and returns a connection to the first one that responds."""
        for address in addresses:
            is_last = address == addresses[-1]
            try:
                timeout = None if is_last else NEXT_ADDRESS_SECONDS
                stream = await super().connect_tcp(address, port, timeout, local_address, socket_options)
                return PeerStream.wrap(stream, (address, port))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if is_last:
                    raise
        raise OSError("the name has no address")


class CheckedTransport(httpx2.AsyncHTTPTransport):
    """The transport of httpx2 for connections without a proxy. It connects through `CheckedBackend`."""

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
    """Returns the IP addresses of a host. Blocks until the operating system has answered. Raises OSError."""
    try:
        entries = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError("the name is not valid") from None
    return list(dict.fromkeys(str(address[0]) for *_, address in entries))


class _CheckedConnection(HTTPConnection):
    """A urllib3 connection that connects only to addresses that `policy` and `reach` allow. Calls `on_connection` in
    the requesting thread before it waits for a response: with the socket that the response is read from, and the IP
    address of its peer (None: a proxy is between)."""

    policy: AddressPolicy
    reach: Reach
    on_connection: OnConnection
    peer: str | None = None

    def _new_conn(self) -> socket.socket:
        host, port = self._dns_host, self.port or 0
        if self.proxy is not None:
            return super()._new_conn()
        if self.reach.is_unrestricted(host, port):
            new_socket = super()._new_conn()
        else:
            new_socket = self._connect_checked(host, port)
        self.peer = new_socket.getpeername()[0]
        return new_socket

    def _connect_checked(self, host: str, port: int) -> socket.socket:
        """Resolves the host, and connects to the first of its allowed addresses that responds."""
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
            self._dns_host = host  # urllib3 checks the certificate against the name
        raise NewConnectionError(self, "the name has no address")

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        if self.sock is not None:
            self.on_connection(self.sock, self.peer)
        return super().getresponse()


def pool_classes(
    policy: AddressPolicy, reach: Reach, on_connection: OnConnection
) -> dict[str, type[HTTPConnectionPool]]:
    """Returns the value for `PoolManager.pool_classes_by_scheme` that makes urllib3 use `_CheckedConnection`. An
    exception raised by `on_connection` ends the request."""
    attributes = {"policy": policy, "reach": reach, "on_connection": staticmethod(on_connection)}
    plain = type("Plain", (_CheckedConnection,), attributes)
    secure = type("Secure", (_CheckedConnection, HTTPSConnection), attributes)
    return {
        "http": type("PlainPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("SecurePool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
    }


log = logging.getLogger("registry.upstream")


class TrustStore:
    """The TLS context for both HTTP libraries. It trusts the system's certificate authorities, or those in `ca_file`
    instead, and always verifies certificates. Created at the first https request."""

    def __init__(self, ca_file: Path | None) -> None:
        self._ca_file = ca_file
        self._context: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def context(self) -> ssl.SSLContext:
        """Returns the context. Raises UpstreamUnavailable if `ca_file` cannot be read; the log says why. Blocks for
        about 30 ms at the first call."""
        with self._lock:
            if self._context is None:
                self._context = self._create_context()
            return self._context

    def _create_context(self) -> ssl.SSLContext:
        if self._ca_file is None:
            return httpx2.create_ssl_context()
        try:
            return ssl.create_default_context(cafile=str(self._ca_file))
        except OSError as error:  # ssl.SSLError is one
            log.error("the certificates in %s cannot be read: %s", self._ca_file, error)
            raise UpstreamUnavailable("the upstream's ca_file cannot be read; the server's log says why") from None


class OutboundProxies:
    """The proxies that the environment variables name. They are read once, when the object is created."""

    def __init__(self) -> None:
        self._by_scheme = getproxies_environment()
        self._no_proxy = [entry.strip().lower() for entry in self._by_scheme.get("no", "").split(",") if entry.strip()]

    def proxy_for(self, url: str) -> str | None:
        """Returns the URL of the proxy for a request to `url`; None for a direct connection. Raises UpstreamUnavailable
        for a proxy that is neither http nor https."""
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
        return entry in (f"{shown}:{port}", shown)  # curl and Go ignore other entries, too
