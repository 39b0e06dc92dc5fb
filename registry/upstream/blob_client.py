"""Downloads of blobs, with urllib3 in threads: the event loop does not touch the bytes (docs/adr/0010)."""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3 import HTTPResponse
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)

from registry.config import Upstream
from registry.upstream.destinations import AddressPolicy, NetworkClass, Reach, RedirectChain, loggable_origin, origin
from registry.upstream.request_limits import COMMON_HEADERS, KIB, SMALL_ANSWER, wait_uncancelled
from registry.upstream.transfer import (
    BlobTransfer,
    Connection,
    SinkRaised,
    SocketBody,
    TransferAbandoned,
    response_span,
)
from registry.upstream.transport import OutboundProxies, TrustStore, pool_classes
from registry.upstream.upstream_responses import UpstreamResponse, parse_count
from storage.errors import RegistryError, UpstreamTimeout, UpstreamUnavailable

BUFFER_SIZE = 1024 * KIB
"""Bytes of each thread's buffer, which is reused."""
MIN_BYTES_PER_IDLE_TIMEOUT = 4 * KIB
"""Bytes that must arrive in each `idle_timeout`. A slower sender would hold a connection that others could use."""


class _ThreadState(threading.local):
    """State of each thread."""

    transfer: BlobTransfer | None = None
    buffer: bytearray | None = None
    peer: str | None = None


class BlobClient:
    """The connections for blobs of one upstream. Contacts nobody when it is created; starts threads as they are
    needed."""

    def __init__(self, settings: Upstream, proxies: OutboundProxies, trust: TrustStore, policy: AddressPolicy) -> None:
        self._connections = settings.connections
        self._idle = settings.idle_timeout
        self._start_timeout = 2 * (settings.connect_timeout + settings.idle_timeout)
        self._policy = policy
        self._redirect_reach = Reach(None, settings.redirect_host_ports)
        self._timeout = urllib3.Timeout(connect=settings.connect_timeout, read=settings.idle_timeout)
        self._proxies = proxies
        self._trust = trust
        # Twice the connections: a transfer abandoned while it connects keeps its thread for a moment.
        self._threads = ThreadPoolExecutor(2 * settings.connections, f"upstream-{settings.name}")
        self._thread = _ThreadState()
        self._pools: dict[tuple[str | None, Reach], urllib3.PoolManager] = {}
        self._lock = threading.Lock()
        self._running: set[BlobTransfer] = set()

    async def fetch(self, transfer: BlobTransfer, url: str, headers: Mapping[str, str]) -> UpstreamResponse:
        """Returns the response after its body went to the sink. An unsuccessful response is returned with its body; the
        sink gets nothing. Raises as `UpstreamClient.fetch_blob`, and SinkRaised. A cancellation closes the connection;
        the sink is not called after this method has ended."""
        transfer.on_sent()
        future = self._threads.submit(self._run, transfer, url, headers)
        waiting = asyncio.wrap_future(future)
        self._running.add(transfer)
        try:
            if await self._watch(transfer, waiting):
                return waiting.result()
            transfer.abandon()
            if transfer.begun:
                await wait_uncancelled(waiting)
            waiting.cancel()
            raise UpstreamTimeout(f"{loggable_origin(url)} sends next to nothing")
        except TransferAbandoned:
            raise UpstreamUnavailable("the connection to the upstream was closed here") from None
        except asyncio.CancelledError:  # raised again once the sink is no longer called
            transfer.abandon()
            if not future.cancel() and transfer.begun:
                await wait_uncancelled(waiting)
            waiting.cancel()
            raise
        finally:
            self._running.discard(transfer)

    async def _watch(self, transfer: BlobTransfer, waiting: asyncio.Future[UpstreamResponse]) -> bool:
        """Waits for the end of the transfer. Returns False if too few bytes arrived for too long. Socket timeouts apply
        to each read: a sender of a few bytes now and then would hold a thread and a connection for ever."""
        clock = asyncio.get_running_loop().time
        received, begun, since = 0, False, clock()
        while True:
            await asyncio.wait([waiting], timeout=self._idle)
            if waiting.done():
                return True
            progress = transfer.received - received >= MIN_BYTES_PER_IDLE_TIMEOUT or transfer.begun != begun
            if progress or transfer.in_sink or not transfer.sending:
                received, begun, since = transfer.received, transfer.begun, clock()
            elif clock() - since >= (self._idle if begun else self._start_timeout):
                return False

    def close(self) -> None:
        """Ends running transfers and closes the connections. Idempotent."""
        for transfer in list(self._running):
            transfer.abandon()
        self._threads.shutdown(wait=False)
        with self._lock:
            pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.clear()

    def _run(self, transfer: BlobTransfer, url: str, headers: Mapping[str, str]) -> UpstreamResponse:
        """Runs one transfer. Called in a thread."""
        self._thread.transfer = transfer
        transfer.sending = True
        route = RedirectChain(url, {**COMMON_HEADERS, **headers}, self._redirect_reach)
        try:
            while True:
                transfer.on_socket(None)
                response = self._open(transfer, route)
                if not route.has_moved:
                    transfer.on_headers(response.status)
                route.on_answer(self._network(route))
                try:
                    moves = route.follow(response.status, response.headers.get("location"))
                except UpstreamUnavailable:
                    _release(response)
                    raise
                if moves:
                    _release(response)
                    continue
                if response.status == 200 and _of_unknown_length(response) and "Range" not in route.headers:
                    _release(response)
                    route.headers["Range"] = "bytes=0-"  # the response to a range states the blob's length
                    continue
                if response.status in (200, 206):
                    self._read_body(transfer, response, route)
                    return _answer(response, route)
                return _error_answer(response, route)
        except (TransferAbandoned, SinkRaised, RegistryError):
            raise
        except (HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            # ValueError: a TLS socket that was shut down meanwhile.
            if not route.has_moved and _is_connection_failure(error):
                transfer.on_connection_failed()
            raise _failure(error, route.url) from None
        finally:
            transfer.forget_socket()
            self._thread.transfer = None

    def _open(self, transfer: BlobTransfer, route: RedirectChain) -> HTTPResponse:
        """Sends the request and waits for the headers. Raises TransferAbandoned."""
        for last in (False, True):
            try:
                pool = self._pool(route).connection_from_url(route.url)
                response = pool.urlopen(
                    "GET",
                    _target(route.url) if pool.proxy is None or pool.scheme == "https" else route.url,
                    headers=route.headers,
                    retries=False,
                    assert_same_host=False,
                    redirect=False,
                    timeout=self._timeout,
                    preload_content=False,
                    decode_content=False,
                )
                if isinstance(response, HTTPResponse):
                    return response
                raise TypeError("urllib3 answers over something that is not HTTP/1.1")
            except ProtocolError:
                # The server may close a kept connection just when it is reused.
                if last:
                    raise
                transfer.on_socket(None)  # raises if the connection was closed by `abandon`
        raise AssertionError("the second try returns or raises")

    def _network(self, route: RedirectChain) -> NetworkClass:
        """Returns the network class of the host that has just responded to this thread."""
        if self._proxies.proxy_for(route.url) is not None:
            return self._policy.classify_proxied(origin(route.url)[1])
        return self._policy.classify(self._thread.peer)

    def _pool(self, route: RedirectChain) -> urllib3.PoolManager:
        """Returns the connection pool for the next request: one for each reach, as for small requests."""
        proxy, reach = self._proxies.proxy_for(route.url), route.reach
        if proxy is not None:
            self._policy.check_proxied(reach, *origin(route.url)[1:])
        with self._lock:
            pool = self._pools.get((proxy, reach))
        if pool is None:
            # Reads certificates, so the lock is not held: `close` takes it on the event loop.
            made = self._new_pool(proxy, reach)
            with self._lock:
                pool = self._pools.setdefault((proxy, reach), made)
        return pool

    def _new_pool(self, proxy: str | None, reach: Reach) -> urllib3.PoolManager:
        context = self._trust.context()
        if proxy is None:
            pool = urllib3.PoolManager(32, maxsize=self._connections, ssl_context=context)
        else:
            parts = urlsplit(proxy)
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
            pool = urllib3.ProxyManager(
                parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(),
                32,
                maxsize=self._connections,
                ssl_context=context,
                proxy_ssl_context=context,
                proxy_headers=urllib3.make_headers(proxy_basic_auth=login) if login else None,
            )
        pool.pool_classes_by_scheme = pool_classes(self._policy, reach, self._on_connection)
        return pool

    def _on_connection(self, connection: Connection, peer: str | None) -> None:
        self._thread.peer = peer
        if self._thread.transfer is not None:
            self._thread.transfer.on_socket(connection)

    def _read_body(self, transfer: BlobTransfer, response: HTTPResponse, route: RedirectChain) -> None:
        """Passes the body to the sink."""
        try:
            start, stop, size = response_span(response, transfer.span, route.url)
            body = SocketBody(response, stop - start)
        except BaseException:  # the connection is in an unknown state and must not be reused
            _release(response)
            raise
        try:
            transfer.begin(start, stop, size)
            if self._thread.buffer is None:
                self._thread.buffer = bytearray(BUFFER_SIZE)
            memory, at = memoryview(self._thread.buffer), start
            while at < stop:
                count = body.read_into(memory)
                if not count:
                    raise UpstreamUnavailable(f"{loggable_origin(route.url)} broke off {stop - at} bytes early")
                transfer.take(at, memory[:count])
                at += count
        except BaseException:
            body.discard()
            raise
        transfer.forget_socket()  # first: a connection given back to the pool may be used by another transfer
        body.finish()


def _target(url: str) -> str:
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _of_unknown_length(response: HTTPResponse) -> bool:
    """Returns whether the response does not state the blob's length."""
    return parse_count(response.headers.get("content-length")) is None


def _error_answer(response: HTTPResponse, route: RedirectChain) -> UpstreamResponse:
    """Returns an unsuccessful response, with its body if that is small."""
    body = b""
    try:
        if (response.length_remaining or SMALL_ANSWER) <= SMALL_ANSWER:
            body = response.read(SMALL_ANSWER, decode_content=False)
    finally:
        _release(response)
    return _answer(response, route, body)


def _answer(response: HTTPResponse, route: RedirectChain, body: bytes = b"") -> UpstreamResponse:
    network = route.reach.network or NetworkClass.PUBLIC
    return UpstreamResponse(response.status, _fields(response), route.url, route.is_foreign, body, network)


def _release(response: HTTPResponse) -> None:
    """Gives the connection back to the pool if little is left to read, else closes it."""
    if response.length_remaining is not None and response.length_remaining <= SMALL_ANSWER:
        response.drain_conn()
    connection = response.connection
    if connection is not None:
        response.close()
        connection.close()
    response.release_conn()


def _fields(response: HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.headers.itermerged()}


def _failure(error: Exception, url: str) -> UpstreamUnavailable:
    where = loggable_origin(url)
    cause: BaseException | None = error
    while isinstance(cause, urllib3.exceptions.ProxyError):
        cause = cause.original_error
    timeouts = (ReadTimeoutError, ConnectTimeoutError, TimeoutError)
    if isinstance(cause, timeouts) and not isinstance(cause, NewConnectionError):
        return UpstreamTimeout(f"{where} does not answer in time")
    return UpstreamUnavailable(f"{where} cannot be reached: {_reason(error)}")


def _is_connection_failure(error: Exception) -> bool:
    """Returns whether the error occurred before there was a connection; a refused TLS handshake counts as such."""
    while isinstance(error, urllib3.exceptions.ProxyError):
        error = error.original_error
    return isinstance(error, NewConnectionError | ConnectTimeoutError | NameResolutionError | SSLError)


def _reason(error: Exception) -> str:
    """Returns the error's text without the representations of urllib3 objects, which may contain a whole URL."""
    inner = error.args[-1] if error.args and isinstance(error.args[-1], Exception) else error
    text = inner.strerror if isinstance(inner, OSError) and inner.strerror else type(inner).__name__
    return str(text)[:200]
