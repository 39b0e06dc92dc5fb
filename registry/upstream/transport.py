"""Connections to upstreams: DNS lookups, TLS certificates and proxies for both HTTP libraries (httpx2 for small
requests, urllib3 for blobs), and the connections of urllib3. The connections of httpx2 are in
`registry.upstream.api_transport`.

An upstream chooses the hosts in its redirects and challenges. A request to such a host may connect only to addresses
that are allowed. A *reach* is the set of addresses to which a request may connect. An `AddressPolicy` checks addresses
against a reach (both in `registry.upstream.destinations`). `CheckedBackend` (httpx2) and `_CheckedConnection` (urllib3)
resolve a host name, check its addresses, and connect to a checked address. The libraries must not resolve the name
again, because they could get an unchecked address.

`OutboundProxies` chooses the proxy for both libraries, from the environment variables HTTP_PROXY, HTTPS_PROXY,
ALL_PROXY and NO_PROXY, in upper or lower case. As in curl and Go, NO_PROXY lists hosts, domains, `host:port`, networks
such as `10.0.0.0/8`, or `*`. As in Go and docker, requests to loopback addresses never use a proxy.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import logging
import math
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

import httpx2
from urllib3 import HTTPConnectionPool, HTTPResponse, HTTPSConnectionPool, disable_warnings
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, InsecureRequestWarning, NameResolutionError, NewConnectionError

from registry.client_addresses import is_loopback_host
from registry.single_flight import SingleFlight
from registry.upstream.destinations import AddressPolicy, Reach, origin, registrable_domain
from registry.upstream.request_limits import KeyedSemaphore
from registry.upstream.transfer import Connection
from storage.errors import UpstreamUnavailable

RESOLVER_THREADS = 64
"""Largest number of threads for the lookups of one upstream. Each thread runs one lookup at a time. One repository
cannot occupy all threads: at most 16 of its requests run at a time, for at most 10 s each. A lookup can take about
30 s, and it continues after its request has ended. In 30 s, at most 3 times 16 requests run to their time limit. So the
lookups for one repository occupy at most 48 threads."""
RESOLVER_THREADS_PER_DOMAIN = 2
"""Largest number of concurrent lookups for names of one registrable domain, such as `example.com`."""
RESOLVER_WAIT_SECONDS = 10.0
"""Longest time that a lookup waits for other lookups of its domain to end. Equal to the timeout of requests for
manifests (`REQUEST_TIMEOUT_SECONDS`)."""

MAX_INTERIM_RESPONSES = 100
"""Largest number of interim responses (status 1xx) that a server may send before a response. Real servers send one or
two."""

MAX_IDLE_SECONDS = 30.0
"""Longest time for which an idle connection to an upstream is kept for the next request. The time is short because some
firewalls and NAT gateways forget a connection after 4 idle minutes. A request on a forgotten connection times out."""

OnConnection = Callable[[Connection, str | None], None]
"""A function with two parameters: a connection, and the IP address of the server at the other end of the connection.
The address is None if the connection leads to a proxy."""


class Resolver:
    """Resolves the host names in redirects and challenges of one upstream. Each `Resolver` has its own threads.
    Concurrent calls for the same host and port share one lookup. At most RESOLVER_THREADS_PER_DOMAIN lookups run at a
    time for one registrable domain, so that a domain whose names resolve slowly cannot occupy all threads."""

    def __init__(self, upstream_name: str) -> None:
        self._threads = ThreadPoolExecutor(RESOLVER_THREADS, f"resolve-{upstream_name}")
        self._domain_limit = KeyedSemaphore(RESOLVER_THREADS_PER_DOMAIN)
        self._running_lookups: SingleFlight[list[str]] = SingleFlight()

    async def resolve(self, host: str, port: int) -> list[str]:
        """Returns the IP addresses of a host. Raises OSError if the host has no address, or if its name cannot be
        resolved. If the caller is cancelled, the lookup continues for other callers."""
        return await self._running_lookups.run((host, port), lambda: self._look_up(host, port))

    async def _look_up(self, host: str, port: int) -> list[str]:
        """Waits until fewer than RESOLVER_THREADS_PER_DOMAIN lookups run for the domain, and then resolves the host.
        Raises OSError if the wait takes longer than RESOLVER_WAIT_SECONDS, or if the host cannot be resolved."""
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(RESOLVER_WAIT_SECONDS):
                    await stack.enter_async_context(self._domain_limit.acquire(registrable_domain(host)))
            except TimeoutError:
                raise OSError("other names of its domain resolve slowly") from None
            return await asyncio.get_running_loop().run_in_executor(self._threads, resolve_host, host, port)

    async def aclose(self) -> None:
        """Cancels lookups that have not started. Does not wait for running lookups. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._running_lookups.aclose()


def resolve_host(host: str, port: int) -> list[str]:
    """Returns the IP addresses of a host, without duplicates. Blocks until the operating system has answered. Raises
    OSError if the host cannot be resolved."""
    try:
        address_infos = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError("the name is not valid") from None
    return list(dict.fromkeys(str(address[0]) for *_, address in address_infos))


class _FinalResponse(http.client.HTTPResponse):
    """A response of http.client that skips interim responses (RFC 9110, 15.2), such as `103 Early Hints`. Does not skip
    `101 Switching Protocols`. The base class skips only `100 Continue`."""

    def _read_status(self) -> tuple[str, int, str]:
        """Reads the status line of the response; http.client calls this method. Raises HTTPException after more than
        MAX_INTERIM_RESPONSES interim responses."""
        for _ in range(MAX_INTERIM_RESPONSES + 1):
            version, status, reason = super()._read_status()  # type: ignore[misc]
            if not 100 <= status < 200 or status == http.HTTPStatus.SWITCHING_PROTOCOLS:
                return version, status, reason
            http.client.parse_headers(self.fp)
        raise http.client.HTTPException("too many interim responses")


class _CheckedConnection(HTTPConnection):
    """A urllib3 connection that connects only to its proxy or, without a proxy, to addresses that `policy` and `reach`
    allow. Before the connection waits for a response, it calls `on_connection` with its socket and `peer`, in the
    thread of the request."""

    response_class = _FinalResponse
    policy: AddressPolicy
    reach: Reach
    on_connection: OnConnection
    peer: str | None = None
    """The IP address of the server at the other end; None: a proxy is at the other end, or there is no connection
    yet."""
    idle_since = math.inf
    """When the connection was last given back to its pool, in seconds of the monotonic clock; infinity: never."""

    @property
    def is_connected(self) -> bool:
        """Whether the pool may use the connection for the next request: it is open, and has been idle for at most
        `MAX_IDLE_SECONDS`. Otherwise the pool connects again."""
        return time.monotonic() - self.idle_since <= MAX_IDLE_SECONDS and super().is_connected

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
        """Resolves the host, tries its allowed addresses one after another, and returns the socket of the first
        connection that succeeds."""
        try:
            addresses = resolve_host(host, port)
        except socket.gaierror as error:
            raise NameResolutionError(host, self, error) from error
        except OSError as error:
            raise NewConnectionError(self, str(error)) from error
        addresses = self.policy.allowed_addresses(self.reach, host, port, addresses)
        try:
            for address in addresses:
                self._dns_host = address  # the host to which urllib3 connects
                try:
                    return super()._new_conn()
                except (NewConnectionError, ConnectTimeoutError):
                    if address == addresses[-1]:
                        raise
        finally:
            self._dns_host = host  # urllib3 checks the server's certificate against this name
        raise NewConnectionError(self, "the name has no address")

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        if self.sock is not None:
            self.on_connection(self.sock, self.peer)
        return super().getresponse()


class _IdleTimePool(HTTPConnectionPool):
    """A connection pool that sets `_CheckedConnection.idle_since` when a connection is given back to it."""

    def _put_conn(self, conn: Any) -> None:
        if isinstance(conn, _CheckedConnection):
            conn.idle_since = time.monotonic()
        super()._put_conn(conn)


def pool_classes(
    policy: AddressPolicy, reach: Reach, on_connection: OnConnection
) -> dict[str, type[HTTPConnectionPool]]:
    """Returns the value for `PoolManager.pool_classes_by_scheme` that makes urllib3 use `_CheckedConnection`. If
    `on_connection` raises an exception, the request stops and raises that exception."""
    attributes = {"policy": policy, "reach": reach, "on_connection": staticmethod(on_connection)}
    plain = type("Plain", (_CheckedConnection,), attributes)
    secure = type("Secure", (_CheckedConnection, HTTPSConnection), attributes)
    return {
        "http": type("PlainPool", (_IdleTimePool,), {"ConnectionCls": plain}),
        "https": type("SecurePool", (_IdleTimePool, HTTPSConnectionPool), {"ConnectionCls": secure}),
    }


log = logging.getLogger("registry.upstream")


class TrustStore:
    """Holds the TLS context with which both HTTP libraries verify the certificates of servers. The first call of
    `context` creates it."""

    def __init__(self, ca_file: Path | None) -> None:
        """`ca_file` has the certificate authorities to trust; None: the system's authorities are trusted."""
        self._ca_file = ca_file
        self._context: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def context(self) -> ssl.SSLContext:
        """Returns the TLS context, the same object for all calls. The first call blocks for about 30 ms. May be called
        in any thread. Raises UpstreamUnavailable if `ca_file` cannot be read, and logs why."""
        with self._lock:
            if self._context is None:
                self._context = self._create_context()
            return self._context

    def _create_context(self) -> ssl.SSLContext:
        if self._ca_file is None:
            return httpx2.create_ssl_context()
        try:
            return ssl.create_default_context(cafile=str(self._ca_file))
        except OSError as error:  # also ssl.SSLError, which is a subclass
            log.error("the certificates in %s cannot be read: %s", self._ca_file, error)
            raise UpstreamUnavailable("the upstream's ca_file cannot be read; the server's log says why") from None


class UncheckedTrust(TrustStore):
    """Accepts every certificate, for servers with self-signed certificates. Anybody on the network between this machine
    and such a server can read and change the data of the connection."""

    def __init__(self) -> None:
        super().__init__(None)

    def _create_context(self) -> ssl.SSLContext:
        # urllib3 would print a warning for each connection.
        disable_warnings(InsecureRequestWarning)
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context


class OutboundProxies:
    """The proxies that environment variables name. The variables are read once, when the object is created."""

    def __init__(self) -> None:
        self._variables = getproxies_environment()
        """The values of HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, under the keys `http`, `https`, `all` and
        `no`. A variable that is not set has no key."""
        self._no_proxy = [entry.strip().lower() for entry in self._variables.get("no", "").split(",") if entry.strip()]

    def proxy_for(self, url: str) -> str | None:
        """Returns the URL of the proxy for a request to `url`; None if the request needs no proxy. Raises
        UpstreamUnavailable if the scheme of the proxy is not http or https, such as for a SOCKS proxy."""
        scheme, host, port = origin(url)
        proxy = self._variables.get(scheme) or self._variables.get("all")
        if not proxy or is_loopback_host(host) or any(_matches_no_proxy(entry, host, port) for entry in self._no_proxy):
            return None
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        if urlsplit(proxy).scheme not in ("http", "https"):
            raise UpstreamUnavailable(
                f"the environment names a {urlsplit(proxy).scheme} proxy; only http and https proxies are supported"
            )
        return proxy


def _matches_no_proxy(entry: str, host: str, port: int) -> bool:
    """Returns whether an entry of NO_PROXY applies to requests to this host and port."""
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
        host_in_url = f"[{host}]" if ":" in host else host
        return entry in (f"{host_in_url}:{port}", host_in_url)
