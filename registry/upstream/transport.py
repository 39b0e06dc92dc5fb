"""Connections of both HTTP libraries, made to addresses that were checked.

A name is resolved here, its addresses are checked, and the connection goes to one of those. So it does not matter what
the name resolves to a moment later.

Which certificates are trusted: the system's, or those of `ca_file` instead.

The proxy for an address, from the environment: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, in either case.

Both HTTP libraries are told here, so that they cannot differ. As in curl and Go, NO_PROXY lists hosts, domains and
`host:port`, networks as `10.0.0.0/8`, or `*`; as in Go, and so in docker, loopback addresses never go to a proxy.
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
from registry.upstream.challenges import registrable_domain
from registry.upstream.destinations import AddressPolicy, Reach, origin
from registry.upstream.request_limits import KeyedSemaphore, UpstreamSingleFlight
from registry.upstream.transfer import Connection
from storage.errors import UpstreamUnavailable

RESOLVER_THREADS = 8
"""Names that redirects and challenges lead to, resolved at once."""
RESOLVER_THREADS_PER_DOMAIN = 2
"""Of these, names of one site."""
RESOLVER_WAIT_SECONDS = 10.0
"""A name waits for that: whoever wanted it has given up by then."""
NEXT_ADDRESS_SECONDS = 1.0
"""Seconds after which a host's next address is tried, while the one before does not answer."""

SocketOption = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]
OnConnection = Callable[[Connection, str | None], None]


class PeerStream(httpcore2.AsyncNetworkStream):
    """A connection that knows whom it was made to, also once it is closed."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream, peer: Any) -> None:
        self._stream = stream
        self._peer = peer

    @classmethod
    def of(cls, stream: httpcore2.AsyncNetworkStream, peer: Any) -> PeerStream:
        """Of a new connection, which from here on receives no more than is read."""
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
    """Has the connection stop after each portion until the reader wants more. The event loop takes up to 32 portions of
    256 KiB at once from a fast sender, before any reader can stop it: with 200 requests, that is all memory there is.

    httpcore2 and anyio have no means for that, so this uses attributes of theirs that they do not promise. A change
    there is an AttributeError in the first test."""
    raw: Any = stream._stream  # type: ignore[attr-defined]
    transport, protocol = raw._transport, raw._protocol
    received = protocol.data_received

    def data_received(data: bytes) -> None:
        received(data)
        if not transport.is_closing():
            transport.pause_reading()

    protocol.data_received = data_received
    transport.set_protocol(protocol)  # uvloop has looked up the method before


class Resolver:
    """Looks up names that redirects and challenges lead to, in threads of its own. One look-up for all who want the
    same, and a few at once for the names of one site: an upstream's repository can lead to any name, and one that
    resolves slowly must leave threads for the others."""

    def __init__(self, name: str) -> None:
        self._threads = ThreadPoolExecutor(RESOLVER_THREADS, f"resolve-{name}")
        self._limit = KeyedSemaphore(RESOLVER_THREADS_PER_DOMAIN)
        self._flights = UpstreamSingleFlight()

    async def resolve(self, host: str, port: int) -> list[str]:
        """A host's addresses. Raises OSError. Cancelled: the look-up goes on for the others."""
        found: list[str] = await self._flights.share(f"{host} {port}", lambda: self._look_up(host, port))
        return found

    async def _look_up(self, host: str, port: int) -> list[str]:
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(RESOLVER_WAIT_SECONDS):
                    await stack.enter_async_context(self._limit.hold(registrable_domain(host)))
            except TimeoutError:
                raise OSError("other names of its site resolve slowly") from None
            return await asyncio.get_running_loop().run_in_executor(self._threads, resolve_host, host, port)

    async def aclose(self) -> None:
        """Waits for no thread. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._flights.aclose()


class CheckedBackend(httpcore2.AnyIOBackend):
    """What httpx2 connects with."""

    def __init__(self, gate: AddressPolicy, reach: Reach, resolver: Resolver) -> None:
        self._gate = gate
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
        if self._reach.anywhere(host, port):
            stream = await super().connect_tcp(host, port, timeout, local_address, socket_options)
            return PeerStream.of(stream, stream.get_extra_info("server_addr"))
        try:
            async with asyncio.timeout(timeout):
                found = await self._resolver.resolve(host, port)
                addresses = self._gate.allowed(self._reach, host, port, found)
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
        """A connection to the first address that answers."""
        for address in addresses:
            last = address == addresses[-1]
            try:
                patience = None if last else NEXT_ADDRESS_SECONDS
                stream = await super().connect_tcp(address, port, patience, local_address, socket_options)
                return PeerStream.of(stream, (address, port))
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if last:
                    raise
        raise OSError("the name has no address")


class CheckedTransport(httpx2.AsyncHTTPTransport):
    """httpx2's own, without a proxy, but for how it connects."""

    def __init__(
        self, gate: AddressPolicy, reach: Reach, resolver: Resolver, context: ssl.SSLContext, limits: httpx2.Limits
    ) -> None:
        super().__init__(verify=context, trust_env=False, limits=limits)
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=context,
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=CheckedBackend(gate, reach, resolver),
        )


def resolve_host(host: str, port: int) -> list[str]:
    """A host's addresses. Blocking; raises OSError."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError("the name is none") from None
    return list(dict.fromkeys(str(each[4][0]) for each in found))


class _CheckedConnection(HTTPConnection):
    """urllib3's connection, to checked addresses. `told` is called in the requesting thread with the socket on which an
    answer is waited for, and the address at its other end (None: a proxy is between)."""

    gate: AddressPolicy
    reach: Reach
    told: OnConnection
    peer: str | None = None

    def _new_conn(self) -> socket.socket:
        host, port = self._dns_host, self.port or 0
        if self.proxy is not None:
            return super()._new_conn()
        made = super()._new_conn() if self.reach.anywhere(host, port) else self._to_checked(host, port)
        self.peer = made.getpeername()[0]
        return made

    def _to_checked(self, host: str, port: int) -> socket.socket:
        try:
            addresses = resolve_host(host, port)
        except socket.gaierror as error:
            raise NameResolutionError(host, self, error) from error
        except OSError as error:
            raise NewConnectionError(self, str(error)) from error
        addresses = self.gate.allowed(self.reach, host, port, addresses)
        try:
            for address in addresses:
                self._dns_host = address
                try:
                    return super()._new_conn()
                except (NewConnectionError, ConnectTimeoutError):
                    if address == addresses[-1]:
                        raise
        finally:
            self._dns_host = host  # the certificate is the name's
        raise NewConnectionError(self, "the name has no address")

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        if self.sock is not None:
            self.told(self.sock, self.peer)
        return super().getresponse()


def pool_classes(gate: AddressPolicy, reach: Reach, told: OnConnection) -> dict[str, type[HTTPConnectionPool]]:
    """For `PoolManager.pool_classes_by_scheme`. What `told` raises ends the request."""
    means = {"gate": gate, "reach": reach, "told": staticmethod(told)}
    plain = type("Plain", (_CheckedConnection,), means)
    secure = type("Secure", (_CheckedConnection, HTTPSConnection), means)
    return {
        "http": type("PlainPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("SecurePool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
    }


log = logging.getLogger(__name__)


class TrustStore:
    """One context for both HTTP libraries, made when the first https address is asked. It always verifies."""

    def __init__(self, ca_file: Path | None) -> None:
        self._ca_file = ca_file
        self._context: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def context(self) -> ssl.SSLContext:
        """Raises UpstreamUnavailable when `ca_file` cannot be read; the log says why. Blocking, some 30 ms."""
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
    """Reads the environment once, when made."""

    def __init__(self) -> None:
        self._by_scheme = getproxies_environment()
        self._spared = [entry.strip().lower() for entry in self._by_scheme.get("no", "").split(",") if entry.strip()]

    def of(self, url: str) -> str | None:
        """The proxy's address; None: straight there. Raises UpstreamUnavailable for a proxy of a kind not known."""
        scheme, host, port = origin(url)
        proxy = self._by_scheme.get(scheme) or self._by_scheme.get("all")
        if not proxy or is_loopback_host(host) or any(_matches_no_proxy(entry, host, port) for entry in self._spared):
            return None
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        if urlsplit(proxy).scheme not in ("http", "https"):
            raise UpstreamUnavailable(
                f"the environment names a {urlsplit(proxy).scheme} proxy; only http and https proxies are supported"
            )
        return proxy


def _matches_no_proxy(entry: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY is about that host."""
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
        return entry in (f"{shown}:{port}", shown)  # and what cannot be read is left out, as curl and Go do
