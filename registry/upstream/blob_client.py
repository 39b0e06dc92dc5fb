"""Bodies of blobs: with urllib3 in threads, so that the event loop has nothing to do with the bytes (ADR 10)."""

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
"""Of each thread, used again and again."""
MIN_BYTES_PER_IDLE_TIMEOUT = 4 * KIB
"""Bytes that must come in `idle_timeout`: whoever sends less holds a connection that others could use."""


class _ThreadState(threading.local):
    """What each thread has of its own."""

    transfer: BlobTransfer | None = None
    buffer: bytearray | None = None
    peer: str | None = None


class BlobClient:
    """One upstream's connections for blobs. Made without contacting anybody; threads start as they are needed."""

    def __init__(self, settings: Upstream, proxies: OutboundProxies, trust: TrustStore, policy: AddressPolicy) -> None:
        self._connections = settings.connections
        self._idle = settings.idle_timeout
        self._beginning = 2 * (settings.connect_timeout + settings.idle_timeout)
        self._policy = policy
        self._start = Reach(None, settings.redirect_host_ports)
        self._timeout = urllib3.Timeout(connect=settings.connect_timeout, read=settings.idle_timeout)
        self._proxies = proxies
        self._trust = trust
        # Twice as many: a transfer that was abandoned while it connects still has its thread for a moment.
        self._threads = ThreadPoolExecutor(2 * settings.connections, f"upstream-{settings.name}")
        self._own = _ThreadState()
        self._pools: dict[tuple[str | None, Reach], urllib3.PoolManager] = {}
        self._lock = threading.Lock()
        self._running: set[BlobTransfer] = set()

    async def fetch(self, transfer: BlobTransfer, url: str, headers: Mapping[str, str]) -> UpstreamResponse:
        """The answer, once its body has gone to the sink; where it is no success, with its body and nothing gone to the
        sink. Raises as `UpstreamClient.fetch_blob`, and SinkRaised. Cancelled: the connection is closed, and the sink
        is not called any more when this ends."""
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
        except asyncio.CancelledError:  # raised again once the sink is left alone
            transfer.abandon()
            if not future.cancel() and transfer.begun:
                await wait_uncancelled(waiting)
            waiting.cancel()
            raise
        finally:
            self._running.discard(transfer)

    async def _watch(self, transfer: BlobTransfer, waiting: asyncio.Future[UpstreamResponse]) -> bool:
        """Waits for its end. False: for too long next to nothing has come. The timeouts of sockets are for each read: a
        byte now and then would keep a thread and a connection for ever."""
        clock = asyncio.get_running_loop().time
        received, begun, since = 0, False, clock()
        while True:
            await asyncio.wait([waiting], timeout=self._idle)
            if waiting.done():
                return True
            comes = transfer.received - received >= MIN_BYTES_PER_IDLE_TIMEOUT or transfer.begun != begun
            if comes or transfer.in_sink or not transfer.sending:
                received, begun, since = transfer.received, transfer.begun, clock()
            elif clock() - since >= (self._idle if begun else self._beginning):
                return False

    def close(self) -> None:
        """Ends what is under way and closes the connections. Idempotent."""
        for transfer in list(self._running):
            transfer.abandon()
        self._threads.shutdown(wait=False)
        with self._lock:
            pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.clear()

    def _run(self, transfer: BlobTransfer, url: str, headers: Mapping[str, str]) -> UpstreamResponse:
        """In a thread."""
        self._own.transfer = transfer
        transfer.sending = True
        route = RedirectChain(url, {**COMMON_HEADERS, **headers}, self._start)
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
                    route.headers["Range"] = "bytes=0-"  # an answer to that says how long the blob is
                    continue
                if response.status in (200, 206):
                    self._take(transfer, response, route)
                    return _answer(response, route)
                return _error_answer(response, route)
        except (TransferAbandoned, SinkRaised, RegistryError):
            raise
        except (HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            # ValueError: a socket of TLS that was shut down meanwhile.
            if not route.has_moved and _is_connection_failure(error):
                transfer.on_connection_failed()
            raise _failure(error, route.url) from None
        finally:
            transfer.forget_socket()
            self._own.transfer = None

    def _open(self, transfer: BlobTransfer, route: RedirectChain) -> HTTPResponse:
        """Sends the request and waits for the headers. Raises Abandoned."""
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
                # A connection that was kept open may be closed by the other end just when it is used again.
                if last:
                    raise
                transfer.on_socket(None)  # or it was closed here, and nobody wants another
        raise AssertionError("the second try returns or raises")

    def _network(self, route: RedirectChain) -> NetworkClass:
        """Of the host that has just answered this thread."""
        if self._proxies.proxy_for(route.url) is not None:
            return self._policy.classify_proxied(origin(route.url)[1])
        return self._policy.classify(self._own.peer)

    def _pool(self, route: RedirectChain) -> urllib3.PoolManager:
        """Connections of their own for each reach, as for small requests."""
        proxy, reach = self._proxies.proxy_for(route.url), route.reach
        if proxy is not None:
            self._policy.check_proxied(reach, *origin(route.url)[1:])
        with self._lock:
            pool = self._pools.get((proxy, reach))
        if pool is None:
            # Reads certificates, so without the lock: `close` takes it on the event loop.
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
        self._own.peer = peer
        if self._own.transfer is not None:
            self._own.transfer.on_socket(connection)

    def _take(self, transfer: BlobTransfer, response: HTTPResponse, route: RedirectChain) -> None:
        """The body, to the sink."""
        try:
            start, stop, size = response_span(response, transfer.span, route.url)
            body = SocketBody(response, stop - start)
        except BaseException:  # whatever it was, the connection is not used again as it is
            _release(response)
            raise
        try:
            transfer.begin(start, stop, size)
            if self._own.buffer is None:
                self._own.buffer = bytearray(BUFFER_SIZE)
            memory, at = memoryview(self._own.buffer), start
            while at < stop:
                count = body.read_into(memory)
                if not count:
                    raise UpstreamUnavailable(f"{loggable_origin(route.url)} broke off {stop - at} bytes early")
                transfer.take(at, memory[:count])
                at += count
        except BaseException:
            body.discard()
            raise
        transfer.forget_socket()  # first: once the connection is given back it may be another's
        body.finish()


def _target(url: str) -> str:
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _of_unknown_length(response: HTTPResponse) -> bool:
    """It does not say how long the blob is."""
    return parse_count(response.headers.get("content-length")) is None


def _error_answer(response: HTTPResponse, route: RedirectChain) -> UpstreamResponse:
    """An answer that is no success, with as much of its body as may matter."""
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
    """Keeps the connection if little is left to read, else closes it."""
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
    """It came before any connection did; a connection of TLS that is refused is none either."""
    while isinstance(error, urllib3.exceptions.ProxyError):
        error = error.original_error
    return isinstance(error, NewConnectionError | ConnectTimeoutError | NameResolutionError | SSLError)


def _reason(error: Exception) -> str:
    """The text without urllib3's own objects, whose text may hold a whole address."""
    inner = error.args[-1] if error.args and isinstance(error.args[-1], Exception) else error
    text = inner.strerror if isinstance(inner, OSError) and inner.strerror else type(inner).__name__
    return str(text)[:200]
