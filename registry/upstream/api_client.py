"""Small requests to upstreams (manifests, tokens, lists, HEAD), with httpx2 on the event loop. Follows redirects."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx2

from registry.config import Upstream
from registry.memory_budget import MemoryBudget, ShareScope
from registry.upstream.destinations import AddressPolicy, NetworkClass, Reach, RedirectChain, loggable_origin, origin
from registry.upstream.endpoints import EndpointAttempt
from registry.upstream.request_limits import COMMON_HEADERS, MIB, SMALL_ANSWER
from registry.upstream.transport import CheckedTransport, OutboundProxies, Resolver, TrustStore
from registry.upstream.upstream_responses import UpstreamResponse, parse_count
from storage.errors import UpstreamTimeout, UpstreamUnavailable

_ASSUMED_LENGTH = 1 * MIB
"""Bytes reserved for a response that does not state its length, before it is read."""
_PIECES_AT_ONCE = 64
"""Pieces of a body that are processed before other tasks run. If a registry sends chunks of one byte, a single read
from its socket yields ten thousand of them."""

_LOCATION_EXTENSION = "entrepot.location"
_CONNECTION_LOST = (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError, httpx2.CloseError)


class ApiClient:
    """The connections for small requests to one upstream. Contacts nobody when it is created."""

    def __init__(
        self,
        settings: Upstream,
        proxies: OutboundProxies,
        trust: TrustStore,
        policy: AddressPolicy,
        memory: MemoryBudget | None = None,
    ) -> None:
        """`memory`: the budget for responses larger than `SMALL_ANSWER`."""
        self._memory = memory or MemoryBudget(32 * MIB, "answers")
        self._proxies = proxies
        self._trust = trust
        self._policy = policy
        self._resolver = Resolver(settings.name)
        self._redirect_reach = Reach(None, settings.redirect_host_ports)
        idle = settings.idle_timeout
        self._timeout = httpx2.Timeout(connect=settings.connect_timeout, read=idle, write=idle, pool=None)
        self._clients: dict[tuple[str | None, Reach], httpx2.AsyncClient] = {}

    def reach_from(self, answer: UpstreamResponse) -> Reach:
        """Returns where a URL named by that response may lead."""
        return self._redirect_reach.after(answer.network)

    async def ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        most: int = SMALL_ANSWER,
        form: Mapping[str, str] | None = None,
        content: bool = True,
        reach: Reach | None = None,
        attempt: EndpointAttempt | None = None,
        memory: ShareScope | None = None,
    ) -> UpstreamResponse:
        """Returns the response with its body; without the body if `content` is False and the request succeeded. Follows
        redirects, except with a `form`. `reach`: where the URL may lead if the settings do not name it. `attempt` is
        told how the endpoint responds. Raises UpstreamUnavailable (also for a body above `most` bytes, a compressed
        body, or an address out of reach), UpstreamTimeout, TooManyRequests (no memory for the body). A large body
        counts against the memory budget until the block of `memory` ends; None: while it is received."""
        route = RedirectChain(url, headers, reach or self._redirect_reach)
        while True:
            current = None if route.has_moved else attempt
            response = await self._send(method, route, form, current)
            try:
                route.on_answer(self._network(response, route))
                if current is not None:
                    current.on_headers(response.status_code)
                if form is None and route.follow(response.status_code, response.extensions.get(_LOCATION_EXTENSION)):
                    continue
                wanted = method != "HEAD" and (content or not response.is_success)
                body = await self._body(response, most, memory) if wanted else b""
            finally:
                await response.aclose()
            network = route.reach.network or NetworkClass.PUBLIC
            return UpstreamResponse(response.status_code, _fields(response), route.url, route.is_foreign, body, network)

    async def _send(
        self, method: str, route: RedirectChain, form: Mapping[str, str] | None, attempt: EndpointAttempt | None
    ) -> httpx2.Response:
        client = await self._client(route)
        if attempt is not None:
            attempt.on_sent()
        for last in (False, True):
            try:
                request = client.build_request(method, route.url, headers=route.headers, data=form)
                return await client.send(request, stream=True)
            except _CONNECTION_LOST as error:
                # The server may close a kept connection just when it is reused.
                if last:
                    raise _failure(error, route.url) from None
            except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, OSError) as error:
                if attempt is not None and isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
                    attempt.on_connection_failed()
                raise _failure(error, route.url) from None
        raise AssertionError("the second try returns or raises")

    def _network(self, response: httpx2.Response, route: RedirectChain) -> NetworkClass:
        """Returns the network class of the host that has responded."""
        if self._proxies.proxy_for(route.url) is not None:
            return self._policy.classify_proxied(origin(route.url)[1])
        peer = response.extensions["network_stream"].get_extra_info("server_addr")
        return self._policy.classify(peer[0] if peer else None)

    async def _body(self, response: httpx2.Response, most: int, memory: ShareScope | None) -> bytes:
        success, where = response.is_success, loggable_origin(str(response.url))
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        if success and coding not in ("identity", ""):
            raise UpstreamUnavailable(f"{where} compresses its answer, which was not asked for")
        body = bytearray()
        pieces = 0
        share = self._memory.share()
        length = parse_count(response.headers.get("content-length")) or 0
        try:
            if "content-length" not in response.headers and most > SMALL_ANSWER:
                length = _ASSUMED_LENGTH  # megabytes can arrive before they are counted
            if SMALL_ANSWER < length <= most:
                await share.grow(2 * length)  # the body is copied once
            async for piece in response.aiter_raw():
                body += piece
                pieces += 1
                if pieces % _PIECES_AT_ONCE == 0:
                    await asyncio.sleep(0)
                if len(body) > most:
                    if success:
                        raise UpstreamUnavailable(f"{where} answers with more than {most} bytes")
                    break
                if len(body) > max(SMALL_ANSWER, share.size):
                    await share.grow(2 * len(body) - share.size)
            whole = bytes(body[:most])
        except (httpx2.HTTPError, OSError) as error:
            share.close()
            raise _failure(error, where) from None
        except BaseException:
            share.close()
            raise
        finally:
            body.clear()
        if memory is None:
            share.close()
        else:
            memory.hold(share)
        return whole

    async def _client(self, route: RedirectChain) -> httpx2.AsyncClient:
        """Returns the client for the next request. Each reach has a connection pool of its own: a connection to an
        address that the settings name is not used where a redirect may not go, and hanging targets of redirects take no
        connections from the endpoints."""
        proxy, reach = self._proxies.proxy_for(route.url), route.reach
        if proxy is not None:
            self._policy.check_proxied(reach, *origin(route.url)[1:])
        if (proxy, reach) not in self._clients:
            context = await asyncio.to_thread(self._trust.context)
            if (proxy, reach) not in self._clients:
                limits = httpx2.Limits(max_connections=64, max_keepalive_connections=16, keepalive_expiry=30.0)
                secure = proxy is not None and proxy.startswith("https:")
                self._clients[proxy, reach] = httpx2.AsyncClient(
                    verify=context,
                    transport=CheckedTransport(self._policy, reach, self._resolver, context, limits)
                    if proxy is None
                    else None,
                    proxy=httpx2.Proxy(proxy, ssl_context=context if secure else None) if proxy else None,
                    trust_env=False,
                    timeout=self._timeout,
                    limits=limits,
                    headers=COMMON_HEADERS,
                    cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
                    event_hooks={"response": [_set_aside_location]},
                )
        return self._clients[proxy, reach]

    async def aclose(self) -> None:
        """Closes the connections. Idempotent."""
        await self._resolver.aclose()
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.aclose()


async def _set_aside_location(response: httpx2.Response) -> None:
    """Moves the `Location` header into an extension: httpx2 would parse the URL, of any length, even if it does not
    follow the redirect."""
    if (location := response.headers.get("location")) is not None:
        response.extensions[_LOCATION_EXTENSION] = location
        del response.headers["location"]


def _fields(response: httpx2.Response) -> dict[str, str]:
    fields: dict[str, str] = {}
    for name, value in response.headers.multi_items():
        name = name.lower()
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def _failure(error: Exception, url: str) -> UpstreamUnavailable:
    where = loggable_origin(url)
    if isinstance(error, httpx2.TimeoutException):
        return UpstreamTimeout(f"{where} does not answer in time")
    return UpstreamUnavailable(f"{where} cannot be reached: {str(error)[:200] or type(error).__name__}")
