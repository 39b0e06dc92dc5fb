"""Downloads the bytes of blobs from an upstream (`BlobClient`), with urllib3 in threads. The bytes do not pass through
the event loop, so the loop has time for other requests (docs/adr/0010).

The download of one byte range of a blob is a *transfer* (`BlobTransfer`). A transfer passes the bytes to a *sink*, an
object of the mirror that receives bytes. An *endpoint* is one of the URLs of an upstream. A transfer first sends a
request to an endpoint, and then one request for each redirect. These requests are the *steps* of a *route*.
"""

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
from registry.mirror.upstream_client import BlobLengthWrong
from registry.single_flight import wait_uncancelled
from registry.upstream.destinations import AddressPolicy, NetworkClass, Reach, RedirectChain, loggable_origin, origin
from registry.upstream.request_limits import COMMON_HEADERS, KIB, SMALL_BODY_BYTES
from registry.upstream.transfer import (
    BlobTransfer,
    Connection,
    SinkRaised,
    SocketBody,
    TransferAbandoned,
    has_unknown_length,
    response_span,
)
from registry.upstream.transport import OutboundProxies, TrustStore, pool_classes
from registry.upstream.upstream_responses import UpstreamResponse
from storage.errors import RegistryError, UpstreamTimeout, UpstreamUnavailable

READ_BUFFER_BYTES = 1024 * KIB
"""Size of the buffer into which a thread reads the bytes of blobs. Each thread has one buffer, which it reuses."""
MIN_BYTES_PER_IDLE_TIMEOUT = 4 * KIB
"""Bytes that must arrive within each period of `idle_timeout` (a setting of the upstream). If fewer arrive, the
transfer is stopped, because it occupies a connection that other transfers could use."""


class _ThreadState(threading.local):
    """The values of one download thread."""

    transfer: BlobTransfer | None = None
    """The transfer that the thread runs; None: it runs none."""
    buffer: bytearray | None = None
    """The buffer for the bytes of blobs; None until the thread reads its first body."""
    peer: str | None = None
    """The IP address of the server that got the thread's last request; None: a proxy got the request."""


class BlobClient:
    """Downloads blobs of one upstream. Creates connections and threads when they are needed, and reuses them."""

    def __init__(self, settings: Upstream, proxies: OutboundProxies, trust: TrustStore, policy: AddressPolicy) -> None:
        self._connections = settings.connections
        self._idle_timeout = settings.idle_timeout
        # Longest time without progress before the first call of the sink. This time is enough for two requests: one to
        # the endpoint, and one to the target of a redirect.
        self._start_timeout = 2 * (settings.connect_timeout + settings.idle_timeout)
        self._policy = policy
        # The *reach* of a request is the set of addresses to which it may connect. A request to an endpoint may connect
        # to every address (None). After a redirect, `RedirectChain` allows only public addresses, addresses of the same
        # network class as the endpoint's (for example, private addresses), and the hosts in `redirect_host_ports`.
        self._endpoint_reach = Reach(None, settings.redirect_host_ports)
        self._timeout = urllib3.Timeout(connect=settings.connect_timeout, read=settings.idle_timeout)
        self._proxies = proxies
        self._trust = trust
        # There are twice as many threads as connections: if a transfer is abandoned while it connects, it keeps its
        # thread until the attempt to connect ends.
        self._threads = ThreadPoolExecutor(2 * settings.connections, f"upstream-{settings.name}")
        self._thread_state = _ThreadState()
        self._pools: dict[tuple[str | None, Reach], urllib3.PoolManager] = {}
        """The connection pools. A key is the URL of a proxy (None: no proxy) and the reach of the pool's requests."""
        self._pools_lock = threading.Lock()
        self._running: set[BlobTransfer] = set()
        """The transfers that `fetch` is running now."""

    async def fetch(self, transfer: BlobTransfer, url: str, headers: Mapping[str, str]) -> UpstreamResponse:
        """Runs the transfer with a GET of `url`, and returns the response after the sink has received the whole body.
        If the response is unsuccessful, the sink receives nothing, and the returned response contains the first
        SMALL_BODY_BYTES of the body. It has no body if the stated length is larger than SMALL_BODY_BYTES.

        Raises UpstreamUnavailable, UpstreamTimeout and RangesUnsupported. If the sink raises an exception, raises
        SinkRaised with this exception. A cancellation closes the connection. The sink is never called after this method
        has returned or raised."""
        transfer.on_send()  # called here, because it must be called on the event loop
        future = self._threads.submit(self._run, transfer, url, headers)
        result_future = asyncio.wrap_future(future)
        self._running.add(transfer)
        try:
            if await self._wait_for_end(transfer, result_future):
                return result_future.result()
            transfer.abandon()
            if transfer.sink_called:  # a call of the sink may be running
                await wait_uncancelled(result_future)
            result_future.cancel()
            raise UpstreamTimeout(f"{loggable_origin(url)} sends almost no bytes")
        except TransferAbandoned:
            raise UpstreamUnavailable("the connection to the upstream was closed by this registry") from None
        except asyncio.CancelledError:
            transfer.abandon()
            if not future.cancel() and transfer.sink_called:  # a call of the sink may be running
                await wait_uncancelled(result_future)
            result_future.cancel()
            raise
        finally:
            self._running.discard(transfer)

    async def _wait_for_end(self, transfer: BlobTransfer, result_future: asyncio.Future[UpstreamResponse]) -> bool:
        """Returns True when the transfer has ended and `result_future` has its response or error. Returns False after
        `_start_timeout` without progress before the first call of the sink, or after `idle_timeout` without progress
        later. Progress means the first call of the sink, or MIN_BYTES_PER_IDLE_TIMEOUT bytes in a period of
        `idle_timeout`. Socket timeouts are not enough: each read has its own timeout, so a server could send a few
        bytes now and then and occupy a connection for ever."""
        clock = asyncio.get_running_loop().time
        received_bytes, sink_called, last_progress_at = 0, False, clock()
        while True:
            await asyncio.wait([result_future], timeout=self._idle_timeout)
            if result_future.done():
                return True
            has_progress = (
                transfer.received_bytes - received_bytes >= MIN_BYTES_PER_IDLE_TIMEOUT
                or transfer.sink_called != sink_called
            )
            # The time of a call of the sink, and the wait for a thread, do not count against the upstream.
            if has_progress or transfer.is_in_sink or not transfer.has_started:
                received_bytes, sink_called, last_progress_at = transfer.received_bytes, transfer.sink_called, clock()
            elif clock() - last_progress_at >= (self._idle_timeout if sink_called else self._start_timeout):
                return False

    def close(self) -> None:
        """Abandons running transfers, whose callers get UpstreamUnavailable, and closes the connections. Does not wait
        for the threads. Idempotent."""
        for transfer in list(self._running):
            transfer.abandon()
        self._threads.shutdown(wait=False)
        with self._pools_lock:
            pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.clear()

    def _run(self, transfer: BlobTransfer, url: str, headers: Mapping[str, str]) -> UpstreamResponse:
        """Runs one transfer in a thread: sends the request, follows redirects, reads the body of the last response, and
        returns that response. Raises the errors of `fetch`, and TransferAbandoned."""
        self._thread_state.transfer = transfer
        transfer.has_started = True
        route = RedirectChain(url, {**COMMON_HEADERS, **headers}, self._endpoint_reach)
        has_asked_for_size = False
        try:
            while True:
                transfer.begin_request()
                response = self._send(transfer, route)
                if not route.has_moved:  # no redirect was followed yet, so the endpoint itself has responded
                    transfer.on_headers(response.status)
                route.on_response(self._network(route))
                try:
                    is_redirect = route.follow(response.status, response.headers.get("location"))
                except UpstreamUnavailable:
                    _release_connection(response)
                    raise
                if is_redirect:
                    _release_connection(response)
                    continue
                has_range = "Range" in route.headers
                if response.status == 200 and has_unknown_length(response) and not has_range and not has_asked_for_size:
                    _release_connection(response)
                    route.headers["Range"] = "bytes=0-"  # the response to a range request states the blob's length
                    has_asked_for_size = True
                    continue
                if has_asked_for_size and has_range and response.status not in (200, 206):
                    _release_connection(response)
                    del route.headers["Range"]  # the upstream refuses ranges
                    continue
                if response.status in (200, 206):
                    self._read_body(transfer, response, route)
                    return _to_upstream_response(response, route)
                return _read_unsuccessful(response, route)
        except (TransferAbandoned, SinkRaised, RegistryError):
            raise
        except (HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            # A TLS socket that `abandon` has shut down raises ValueError.
            if not route.has_moved and _is_connection_failure(error):
                transfer.on_connection_failed()
            elif not route.has_moved and _is_oversized_head(error):
                transfer.on_oversized_head()
            raise _error_for(error, route.url) from None
        finally:
            transfer.forget_socket()
            self._thread_state.transfer = None

    def _send(self, transfer: BlobTransfer, route: RedirectChain) -> HTTPResponse:
        """Sends the request for the current step of `route`, and returns the response, whose body is not read yet.
        Sends the request a second time after a ProtocolError. Raises TransferAbandoned, UpstreamUnavailable, and the
        errors of urllib3."""
        for is_second_try in (False, True):
            try:
                pool = self._pool(route).connection_from_url(route.url)
                is_sent_to_proxy = pool.proxy is not None and pool.scheme == "http"  # https requests use a tunnel
                response = pool.urlopen(
                    "GET",
                    route.url if is_sent_to_proxy else _request_target(route.url),
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
                raise TypeError(f"urllib3 returned {type(response).__name__} in place of an HTTP/1.1 response")
            except ProtocolError as error:
                # The server may close a kept-alive connection at the moment when the next request is sent on it.
                if is_second_try or _is_oversized_head(error):
                    raise
                transfer.begin_request()  # raises TransferAbandoned if `abandon` has closed the connection
        raise AssertionError("the second try returns or raises")

    def _network(self, route: RedirectChain) -> NetworkClass:
        """Returns the network class, such as public or private, of the server that has responded to the current step of
        `route`. Call this right after the response, in the same thread."""
        if self._proxies.proxy_for(route.url) is not None:
            return self._policy.classify_proxied(origin(route.url)[1])
        return self._policy.classify(self._thread_state.peer)

    def _pool(self, route: RedirectChain) -> urllib3.PoolManager:
        """Returns the connection pool for the current step of `route`. There is one pool for each pair of proxy and
        reach, so that a request cannot use an open connection to an address outside its reach."""
        proxy, reach = self._proxies.proxy_for(route.url), route.reach
        if proxy is not None:
            self._policy.check_proxied(reach, *origin(route.url)[1:])
        with self._pools_lock:
            pool = self._pools.get((proxy, reach))
        if pool is None:
            # Creating a pool takes time, because it reads certificates. The lock is not held during this time, because
            # `close` waits for the lock on the event loop.
            new_pool = self._new_pool(proxy, reach)
            with self._pools_lock:
                pool = self._pools.setdefault((proxy, reach), new_pool)
        return pool

    def _new_pool(self, proxy: str | None, reach: Reach) -> urllib3.PoolManager:
        """Returns a new connection pool for the proxy at this URL (None: no proxy) and for this reach. Raises
        UpstreamUnavailable if the certificate authorities cannot be read."""
        context = self._trust.context()
        if proxy is None:
            pool = urllib3.PoolManager(num_pools=32, maxsize=self._connections, ssl_context=context)
        else:
            parts = urlsplit(proxy)
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
            pool = urllib3.ProxyManager(
                parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(),
                num_pools=32,
                maxsize=self._connections,
                ssl_context=context,
                proxy_ssl_context=context,
                proxy_headers=urllib3.make_headers(proxy_basic_auth=login) if login else None,
            )
        pool.pool_classes_by_scheme = pool_classes(self._policy, reach, self._on_connection)
        return pool

    def _on_connection(self, connection: Connection, peer: str | None) -> None:
        """urllib3 connections call this in the download thread, just before the thread waits for a response on
        `connection`. `peer` is the IP address of the server; None: the connection leads to a proxy."""
        self._thread_state.peer = peer
        if self._thread_state.transfer is not None:
            self._thread_state.transfer.set_socket(connection)

    def _read_body(self, transfer: BlobTransfer, response: HTTPResponse, route: RedirectChain) -> None:
        """Reads the body and passes it to the sink. Raises:

        - BlobLengthWrong if the response states no length, and the body is longer or shorter than
          `transfer.expected_size`. Only a chunked body whose last chunk has arrived is known to be shorter.
        - UpstreamUnavailable if any other body ends too early, or if the response has other bytes than requested.
        - RangesUnsupported, TransferAbandoned, SinkRaised, and errors of the connection."""
        server = loggable_origin(route.url)
        try:
            start, stop, size = response_span(response, transfer.span, route.url, transfer.expected_size)
            body = SocketBody(response, stop - start)
        except BaseException:
            _release_connection(response)
            raise
        try:
            transfer.begin(start, stop, size)
            if self._thread_state.buffer is None:
                self._thread_state.buffer = bytearray(READ_BUFFER_BYTES)
            buffer, offset = memoryview(self._thread_state.buffer), start
            while offset < stop:
                count = body.read_into(buffer)
                # The length is assumed if the response states none: `stop` is then the expected size. The last chunk
                # has arrived, so the connection did not break: the blob has another size than expected.
                if not count and body.is_length_assumed and body.is_chunked:
                    raise BlobLengthWrong(f"{server} sent {offset} bytes of a blob; {stop} bytes were expected")
                if not count:
                    raise UpstreamUnavailable(f"{server} sent {stop - offset} bytes too few")
                transfer.take(offset, buffer[:count])
                offset += count
            if body.is_length_assumed and not body.has_ended():
                raise BlobLengthWrong(f"{server} sent more than {stop} bytes of a blob; {stop} bytes were expected")
        except BaseException:
            body.discard()
            raise
        transfer.forget_socket()  # before `finish`, after which another transfer may use the connection
        body.finish()


def _request_target(url: str) -> str:
    """Returns the path and query of a URL, for the request line of a request to the server itself, not to a proxy."""
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _read_unsuccessful(response: HTTPResponse, route: RedirectChain) -> UpstreamResponse:
    """Returns an unsuccessful response with the first SMALL_BODY_BYTES of its body. If the stated length is larger
    than SMALL_BODY_BYTES, returns the response without its body."""
    body = b""
    try:
        if (response.length_remaining or SMALL_BODY_BYTES) <= SMALL_BODY_BYTES:
            body = response.read(SMALL_BODY_BYTES, decode_content=False)
    finally:
        _release_connection(response)
    return _to_upstream_response(response, route, body)


def _to_upstream_response(response: HTTPResponse, route: RedirectChain, body: bytes = b"") -> UpstreamResponse:
    """Converts urllib3's response to the current step of `route`. `body`: the part of the body that was read."""
    # `route.on_response` has set `reach.network`, so it is not None here. The `or` is for the type checker.
    network = route.reach.network or NetworkClass.PUBLIC
    return UpstreamResponse(response.status, _header_fields(response), route.url, route.is_cross_origin, body, network)


def _release_connection(response: HTTPResponse) -> None:
    """If at most SMALL_BODY_BYTES of the body are left to read, reads them and gives the connection back to the pool,
    for other requests. In all other cases, closes the connection."""
    if response.length_remaining is not None and response.length_remaining <= SMALL_BODY_BYTES:
        response.drain_conn()
    connection = response.connection
    if connection is not None:  # `drain_conn` has not given the connection back
        response.close()
        connection.close()
    response.release_conn()


def _header_fields(response: HTTPResponse) -> dict[str, str]:
    """Returns the headers by name in lower case. The values of repeated headers are joined with ", "."""
    return {name.lower(): value for name, value in response.headers.itermerged()}


def _error_for(error: Exception, url: str) -> UpstreamUnavailable:
    """Returns the error to raise after a request to `url` has failed with `error`."""
    server = loggable_origin(url)
    cause: BaseException | None = error
    while isinstance(cause, urllib3.exceptions.ProxyError):
        cause = cause.original_error
    timeouts = (ReadTimeoutError, ConnectTimeoutError, TimeoutError)
    if isinstance(cause, timeouts) and not isinstance(cause, NewConnectionError):
        return UpstreamTimeout(f"{server} does not answer in time")
    if _is_oversized_head(error):
        return UpstreamUnavailable(f"{server} sends too many or too long header lines")
    return UpstreamUnavailable(f"{server} cannot be reached: {_reason(error)}")


def _is_connection_failure(error: Exception) -> bool:
    """Returns whether the error means that no connection could be made. A failed TLS handshake counts as well."""
    while isinstance(error, urllib3.exceptions.ProxyError):
        error = error.original_error
    return isinstance(error, NewConnectionError | ConnectTimeoutError | NameResolutionError | SSLError)


def _is_oversized_head(error: Exception) -> bool:
    """Returns whether http.client has refused the head of a response: the head has more than 100 lines, has a line of
    more than 64 KiB, or comes after too many interim responses. For a line that is too long, http.client raises
    LineTooLong. For the other causes, it raises HTTPException itself, and no subclass."""
    cause = error.args[-1] if isinstance(error, ProtocolError) and error.args else error
    return type(cause) is http.client.HTTPException or isinstance(cause, http.client.LineTooLong)


def _reason(error: Exception) -> str:
    """Returns a short text for the error: the system's text of an OSError, and the class name of any other error. An
    error's own text is not used, because urllib3's texts may contain a whole URL, and a signed URL is a secret."""
    inner = error.args[-1] if error.args and isinstance(error.args[-1], Exception) else error
    text = inner.strerror if isinstance(inner, OSError) and inner.strerror else type(inner).__name__
    return str(text)[:200]
