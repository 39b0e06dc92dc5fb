"""Everything small: one request, its answer, redirects followed. With httpx2, on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx2

from registry import __version__
from registry.config import Upstream
from registry.memory_budget import MemoryBudget, ShareScope
from registry.upstream.destinations import AddressPolicy, NetworkClass, Reach, RedirectChain, loggable_origin, origin
from registry.upstream.endpoints import EndpointAttempt
from registry.upstream.transport import CheckedTransport, OutboundProxies, Resolver, TrustStore
from registry.upstream.upstream_responses import UpstreamResponse, parse_count
from storage.errors import UpstreamTimeout, UpstreamUnavailable

KIB, MIB = 1 << 10, 1 << 20
SMALL_ANSWER = 64 * KIB
"""Bytes of an answer that is no manifest and no list."""

COMMON_HEADERS = {"User-Agent": f"entrepot/{__version__}", "Accept-Encoding": "identity"}
"""In every request. Content that is compressed on the way has another digest."""

_ASSUMED_LENGTH = 1 * MIB
"""Bytes that an answer is counted with before it is read, if it does not say its length."""
_PIECES_AT_ONCE = 64
"""Pieces of a body that are taken before other requests have their turn. Where a registry sends chunks of one byte, a
single read from its socket holds ten thousand of them."""

_LOCATION_EXTENSION = "entrepot.location"
_CONNECTION_LOST = (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError, httpx2.CloseError)


class ApiClient:
    """One upstream's connections for small requests. Made without contacting anybody."""

    def __init__(
        self,
        settings: Upstream,
        proxies: OutboundProxies,
        trust: TrustStore,
        gate: AddressPolicy,
        memory: MemoryBudget | None = None,
    ) -> None:
        """`memory`: for answers that are larger than `SMALL_ANSWER`."""
        self._memory = memory or MemoryBudget(32 * MIB, "answers")
        self._proxies = proxies
        self._trust = trust
        self._gate = gate
        self._resolver = Resolver(settings.name)
        self._led = Reach(None, settings.redirect_host_ports)
        idle = settings.idle_timeout
        self._timeout = httpx2.Timeout(connect=settings.connect_timeout, read=idle, write=idle, pool=None)
        self._clients: dict[tuple[str | None, Reach], httpx2.AsyncClient] = {}

    def reach_from(self, answer: UpstreamResponse) -> Reach:
        """Where an address named by that answer may be."""
        return self._led.after(answer.network)

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
        trial: EndpointAttempt | None = None,
        memory: ShareScope | None = None,
    ) -> UpstreamResponse:
        """The answer, with its body; without it where `content` is false and the answer is a success. Redirects are
        followed, except for a `form`. `reach`: where an address may be that the settings do not name. `trial` is told
        how the endpoint does. Raises UpstreamUnavailable (also: more than `most` bytes, a body that is compressed, an
        address out of reach), UpstreamTimeout, TooManyRequests (no memory left for it). A large body counts until
        the block of `memory` ends; None: while it is received."""
        route = RedirectChain(url, headers, reach or self._led)
        while True:
            told = None if route.moved else trial
            response = await self._send(method, route, form, told)
            try:
                route.answered(self._network(response, route))
                if told is not None:
                    told.headers(response.status_code)
                if form is None and route.follow(response.status_code, response.extensions.get(_LOCATION_EXTENSION)):
                    continue
                wanted = method != "HEAD" and (content or not response.is_success)
                body = await self._body(response, most, memory) if wanted else b""
            finally:
                await response.aclose()
            network = route.reach.network or NetworkClass.PUBLIC
            return UpstreamResponse(response.status_code, _fields(response), route.url, route.foreign, body, network)

    async def _send(
        self, method: str, route: RedirectChain, form: Mapping[str, str] | None, trial: EndpointAttempt | None
    ) -> httpx2.Response:
        client = await self._client(route)
        if trial is not None:
            trial.sent()
        for last in (False, True):
            try:
                request = client.build_request(method, route.url, headers=route.headers, data=form)
                return await client.send(request, stream=True)
            except _CONNECTION_LOST as error:
                # A connection that was kept open may be closed by the other end just when it is used again.
                if last:
                    raise _failure(error, route.url) from None
            except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, OSError) as error:
                if trial is not None and isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
                    trial.on_connection_failed()
                raise _failure(error, route.url) from None
        raise AssertionError("the second try returns or raises")

    def _network(self, response: httpx2.Response, route: RedirectChain) -> NetworkClass:
        """Of the host that has answered."""
        if self._proxies.of(route.url) is not None:
            return self._gate.classify_proxied(origin(route.url)[1])
        peer = response.extensions["network_stream"].get_extra_info("server_addr")
        return self._gate.network(peer[0] if peer else None)

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
                length = _ASSUMED_LENGTH  # the socket brings megabytes before anybody can count them
            if SMALL_ANSWER < length <= most:
                await share.grow(2 * length)  # it is copied once
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
        """Connections of their own for each reach: one that was made to an address the settings name is not used where
        a redirect may not go, and what hangs where a redirect leads takes no connection from the endpoints."""
        proxy, reach = self._proxies.of(route.url), route.reach
        if proxy is not None:
            self._gate.check_proxied(reach, *origin(route.url)[1:])
        if (proxy, reach) not in self._clients:
            context = await asyncio.to_thread(self._trust.context)
            if (proxy, reach) not in self._clients:
                limits = httpx2.Limits(max_connections=64, max_keepalive_connections=16, keepalive_expiry=30.0)
                secure = proxy is not None and proxy.startswith("https:")
                self._clients[proxy, reach] = httpx2.AsyncClient(
                    verify=context,
                    transport=CheckedTransport(self._gate, reach, self._resolver, context, limits)
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
    """httpx2 would read the address also where it is not to follow it, whatever its length."""
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
