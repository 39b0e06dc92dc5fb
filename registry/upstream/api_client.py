"""Sends requests to an upstream on the event loop, with httpx2 (`ApiClient`): requests for manifests, tokens and lists,
and HEAD requests. `registry.upstream.blob_client` downloads the bytes of blobs.

An *endpoint* is one of the URLs of an upstream. A `RedirectChain` consists of *steps*. The first step is the original
request. Each further step is a request to the target of a redirect.
"""

from __future__ import annotations

import asyncio
import io
from collections import defaultdict
from collections.abc import Mapping

import httpx2

from registry.config import Upstream
from registry.memory_budget import MemoryBudget, ShareScope
from registry.response_limits import MAX_HEADER_LINES, PIECES_PER_PAUSE, NoCookies, TooManyHeaderLines
from registry.single_flight import note_sending, server_stopping_error
from registry.upstream.api_transport import CheckedTransport, ProxiedTransport
from registry.upstream.destinations import AddressPolicy, NetworkClass, Reach, RedirectChain, loggable_origin, origin
from registry.upstream.endpoints import EndpointAttempt
from registry.upstream.request_limits import COMMON_HEADERS, MIB, SMALL_BODY_BYTES, hold_slot
from registry.upstream.transport import MAX_IDLE_SECONDS, OutboundProxies, Resolver, TrustStore
from registry.upstream.upstream_responses import UpstreamResponse, parse_count
from storage.errors import UpstreamTimeout, UpstreamUnavailable

MAX_CONNECTIONS = 64
"""Largest number of connections of each HTTP client in `ApiClient._clients`."""
_ASSUMED_BODY_BYTES = 1 * MIB
"""If a response does not state the length of its body, the client assumes this length for the memory budget."""
_LOCATION_EXTENSION = "entrepot.location"
"""The key in the `extensions` of a response under which `_move_location` stores the `Location` header."""
_CONNECTION_LOST_ERRORS = (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError, httpx2.CloseError)
"""Errors which may mean that the server has closed a kept-alive connection. After such an error, the request is sent a
second time."""


class ApiClient:
    """Sends requests to one upstream, and keeps the connections for later requests. Connects at the first request."""

    def __init__(
        self,
        settings: Upstream,
        proxies: OutboundProxies,
        trust: TrustStore,
        policy: AddressPolicy,
        memory: MemoryBudget | None = None,
    ) -> None:
        """`memory` is the budget for bodies larger than SMALL_BODY_BYTES; None: a budget of 32 MiB for this client
        alone."""
        self._memory = memory or MemoryBudget(32 * MIB, "answers")
        self._proxies = proxies
        self._trust = trust
        self._policy = policy
        self._resolver = Resolver(settings.name)
        # A request to an endpoint may connect to every address (None). After a redirect (`Reach.after`), only public
        # addresses, addresses of the endpoint's kind of network, and the hosts and ports in the settings are allowed.
        self._endpoint_reach = Reach(None, settings.redirect_host_ports)
        idle_timeout = settings.idle_timeout
        self._timeout = httpx2.Timeout(
            connect=settings.connect_timeout, read=idle_timeout, write=idle_timeout, pool=None
        )
        self._clients: dict[tuple[str | None, Reach], tuple[httpx2.AsyncClient, asyncio.Semaphore]] = {}
        """The HTTP clients, each with a semaphore that has one slot for each connection. A key is the URL of a proxy
        (None: no proxy) and the addresses to which the client may connect."""

    def addresses_allowed_for_links(self, response: UpstreamResponse) -> Reach:
        """Returns the addresses to which a URL in `response` may lead, such as the URL of a next page."""
        return self._endpoint_reach.after(response.network)

    async def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        max_bytes: int = SMALL_BODY_BYTES,
        form: Mapping[str, str] | None = None,
        read_body: bool = True,
        reach: Reach | None = None,
        attempt: EndpointAttempt | None = None,
        memory: ShareScope | None = None,
    ) -> UpstreamResponse:
        """Sends a request, follows redirects, and returns the response.

        - `max_bytes`: the largest body of a successful response. The body of another response is cut off after this
          size.
        - `form`: fields to send as the body, as an HTML form does. With a form, redirects are not followed.
        - `read_body`: if False, a successful response is returned without its body.
        - `reach`: the addresses to which `url` may lead. None: every address, because `url` is from the settings.
        - `attempt`: gets reports on the responses of the endpoint, but not on those of the targets of redirects.
        - `memory`: a context manager that determines how long a body larger than SMALL_BODY_BYTES counts against the
          memory budget. The body counts until the `with` block of `memory` ends. None: the body counts only until this
          method returns.

        Raises UpstreamTimeout. Raises TooManyRequests if the memory budget has not enough free memory for the body.
        Raises UpstreamUnavailable if the connection fails, an address is outside `reach`, there are too many or bad
        redirects, a response has too many header lines, or the body of a successful response is compressed or larger
        than `max_bytes`. A cancellation closes the connection.
        """
        route = RedirectChain(url, headers, reach or self._endpoint_reach)
        while True:
            endpoint_attempt = None if route.has_moved else attempt
            client, slots = await self._client(route)
            async with hold_slot(slots):
                # If this task belongs to a `SingleFlight`, it now continues even if all callers that wait for its
                # result leave. The next caller then needs no second request.
                note_sending()
                response = await self._send_step(client, method, route, form, endpoint_attempt)
                try:
                    route.on_response(self._network(response, route))
                    if endpoint_attempt is not None:
                        endpoint_attempt.on_headers(response.status_code)
                    location = response.extensions.get(_LOCATION_EXTENSION)
                    if form is None and route.follow(response.status_code, location):
                        continue
                    has_body = method != "HEAD" and (read_body or not response.is_success)
                    body = await self._read_body(response, max_bytes, memory) if has_body else b""
                finally:
                    await response.aclose()
            network = route.reach.network or NetworkClass.PUBLIC
            return UpstreamResponse(
                response.status_code, _header_fields(response), route.url, route.is_cross_origin, body, network
            )

    async def _send_step(
        self,
        client: httpx2.AsyncClient,
        method: str,
        route: RedirectChain,
        form: Mapping[str, str] | None,
        attempt: EndpointAttempt | None,
    ) -> httpx2.Response:
        """Sends the request for the current step of `route`, and returns the response before its body is read. Sends
        the request a second time after an error in _CONNECTION_LOST_ERRORS. Raises UpstreamTimeout. Raises
        UpstreamUnavailable, also after `aclose`."""
        if attempt is not None:
            attempt.on_send()
        for is_second_try in (False, True):
            if client.is_closed:  # by `aclose`, while the request waited for a slot or for the response
                raise server_stopping_error()
            try:
                request = client.build_request(method, route.url, headers=route.headers, data=form)
                return await client.send(request, stream=True)
            except _CONNECTION_LOST_ERRORS as error:
                # The server may close a kept-alive connection at the moment when the next request is sent on it.
                if is_second_try:
                    raise _error_for(error, route.url) from None
            except TooManyHeaderLines as error:
                if attempt is not None:
                    attempt.on_working()  # the endpoint responds, so its circuit breaker must not open
                raise _error_for(error, route.url) from None
            except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, OSError) as error:
                if attempt is not None and isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
                    attempt.on_connection_failed()
                raise _error_for(error, route.url) from None
        raise AssertionError("the second try returns or raises")

    def _network(self, response: httpx2.Response, route: RedirectChain) -> NetworkClass:
        """Returns the network class, such as public or private, of the server that has sent `response` for the current
        step of `route`."""
        if self._proxies.proxy_for(route.url) is not None:
            return self._policy.classify_proxied(origin(route.url)[1])
        peer = response.extensions["network_stream"].get_extra_info("server_addr")
        return self._policy.classify(peer[0] if peer else None)

    async def _read_body(self, response: httpx2.Response, max_bytes: int, memory: ShareScope | None) -> bytes:
        """Reads and returns the body, and counts it against the memory budget. See `send` for `max_bytes`, `memory` and
        the errors."""
        is_success, server = response.is_success, loggable_origin(str(response.url))
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        if is_success and coding not in ("identity", ""):
            raise UpstreamUnavailable(f"{server} compresses its response, although the request does not allow this")
        body = io.BytesIO()  # its `getvalue` does not copy; a copy of 8 MiB would occupy the event loop for 5 to 40 ms
        size = pieces = 0
        share = self._memory.new_share()
        length = parse_count(response.headers.get("content-length")) or 0
        try:
            if "content-length" not in response.headers and max_bytes > SMALL_BODY_BYTES:
                # The client may hold this many bytes in memory before the loop below counts them.
                length = _ASSUMED_BODY_BYTES
            if SMALL_BODY_BYTES < length <= max_bytes:
                await share.grow(2 * length)  # twice the body, because the caller needs as much again to parse it
            async for piece in response.aiter_raw():
                size += body.write(piece)
                pieces += 1
                if pieces % PIECES_PER_PAUSE == 0:
                    await asyncio.sleep(0)
                if size > max_bytes:
                    if is_success:
                        raise UpstreamUnavailable(f"{server} answers with more than {max_bytes} bytes")
                    break
                if size > max(SMALL_BODY_BYTES, share.size):
                    await share.grow(2 * size - share.size)
            body.truncate(max_bytes)
            complete_body = body.getvalue()
        except (httpx2.HTTPError, OSError, TooManyHeaderLines) as error:
            share.close()
            raise _error_for(error, server) from None
        except BaseException:
            share.close()
            raise
        finally:
            body.close()
        if memory is None:
            share.close()
        else:
            memory.hold(share)
        return complete_body

    async def _client(self, route: RedirectChain) -> tuple[httpx2.AsyncClient, asyncio.Semaphore]:
        """Returns the httpx2 client for the current step of `route`, and the semaphore with the client's connection
        slots. Each pair of proxy and `Reach` has its own client with its own connections. So a redirect never reuses an
        open connection to an address outside its reach, and requests that wait for a redirect's target use up no
        connections to the endpoints."""
        proxy, reach = self._proxies.proxy_for(route.url), route.reach
        if proxy is not None:
            self._policy.check_proxied(reach, *origin(route.url)[1:])
        if (proxy, reach) not in self._clients:
            context = await asyncio.to_thread(self._trust.context)
            if (proxy, reach) not in self._clients:  # no other task has created it during the `await`
                limits = httpx2.Limits(
                    max_connections=MAX_CONNECTIONS, max_keepalive_connections=16, keepalive_expiry=MAX_IDLE_SECONDS
                )
                client = httpx2.AsyncClient(
                    transport=CheckedTransport(self._policy, reach, self._resolver, context, limits)
                    if proxy is None
                    else ProxiedTransport(proxy, context, limits),
                    trust_env=False,
                    timeout=self._timeout,
                    headers=COMMON_HEADERS,
                    cookies=NoCookies(),
                    event_hooks={"response": [_move_location]},
                )
                self._clients[proxy, reach] = client, asyncio.Semaphore(MAX_CONNECTIONS)
        return self._clients[proxy, reach]

    async def aclose(self) -> None:
        """Stops lookups of host names and closes the connections. `send` calls in progress raise UpstreamUnavailable.
        May be called repeatedly."""
        await self._resolver.aclose()
        clients, self._clients = self._clients, {}
        for client, _ in clients.values():
            await client.aclose()


async def _move_location(response: httpx2.Response) -> None:
    """Moves the `Location` header into the `extensions` of the response. Otherwise httpx2 would parse the URL in the
    header, and a very long URL would block the event loop."""
    if (location := response.headers.get("location")) is not None:
        response.extensions[_LOCATION_EXTENSION] = location
        del response.headers["location"]


def _header_fields(response: httpx2.Response) -> dict[str, str]:
    """Returns the values of the headers by lower-case name. Joins the values of a repeated header with ", "."""
    values: defaultdict[str, list[str]] = defaultdict(list)
    for name, value in response.headers.multi_items():
        values[name.lower()].append(value)
    return {name: ", ".join(repeated) for name, repeated in values.items()}


def _error_for(error: Exception, url: str) -> UpstreamUnavailable:
    """Returns the error to raise after a request to `url` has failed with `error`."""
    server = loggable_origin(url)
    if isinstance(error, httpx2.TimeoutException):
        return UpstreamTimeout(f"{server} does not answer in time")
    if isinstance(error, TooManyHeaderLines):
        return UpstreamUnavailable(f"{server} sends more than {MAX_HEADER_LINES} header lines")
    return UpstreamUnavailable(f"{server} cannot be reached: {str(error)[:200] or type(error).__name__}")
