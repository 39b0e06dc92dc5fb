"""`DistributionAPI`: everything below `/v2`, as one ASGI callable over a registry.

A handler parses the request, makes its call on the registry, and sends the answer. Errors are raised, and answered in
one place: here.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from registry.http import blobs, listing, manifests, uploads
from registry.http.answer_cache import AnswerCache, CachedAnswer
from registry.http.asgi import Header, Receive, Scope, Send, new_request_id, raw_path
from registry.http.body_memory import BodyMemory
from registry.http.challenge import Authenticator, Challenges
from registry.http.cross_site import CrossSiteCheck
from registry.http.disconnect import ClientGone
from registry.http.errors import MethodUnknown
from registry.http.exchange import Exchange, RequestLimits
from registry.http.failures import log_cut, log_failure, send_error, send_failure
from registry.http.headers import JSON, REVALIDATE, allow_header
from registry.http.namespaces import Namespaces
from registry.http.rate_limit import RateLimit, check_rate, rate_key
from registry.http.routing import parse_path
from registry.request import UNRESTRICTED, enter_request
from storage.errors import RegistryError, TooManyOpenFiles, Unauthorized
from storage.interface import Registry
from storage.names import RepositoryName

log = logging.getLogger("registry.http")

Handler = Callable[[Exchange], Awaitable[None]]


async def ping(exchange: Exchange) -> None:
    """Says that this is a registry of version 2 ("Determining Support", end-1). Docker reads a challenge here and
    nowhere else, so a request without credentials gets one, even where pulls need none."""
    if not exchange.principal.is_admitted:
        raise Unauthorized
    await exchange.send_whole(200, b"{}", JSON, REVALIDATE)


HANDLERS: Final[Mapping[str, Mapping[str, Handler]]] = MappingProxyType(
    {
        "ping": {"GET": ping, "HEAD": ping},
        "catalog": {"GET": listing.list_repositories, "HEAD": listing.list_repositories},
        "tags": {"GET": listing.list_tags, "HEAD": listing.list_tags},
        "referrers": {"GET": listing.list_referrers, "HEAD": listing.list_referrers},
        "manifests": {
            "GET": manifests.get_manifest,
            "HEAD": manifests.head_manifest,
            "PUT": manifests.put_manifest,
            "DELETE": manifests.delete_manifest,
        },
        "blobs": {"GET": blobs.get_blob, "HEAD": blobs.head_blob, "DELETE": blobs.delete_blob},
        "uploads": {"POST": uploads.start_upload},
        "session": {
            "GET": uploads.get_upload,
            "HEAD": uploads.get_upload,
            "PATCH": uploads.append_chunk,
            "PUT": uploads.close_upload,
            "DELETE": uploads.cancel_upload,
        },
    }
)
"""The handlers of each kind of resource, by method."""

_ALLOWED: Final[Mapping[str, tuple[str, ...]]] = {kind: (*methods, "OPTIONS") for kind, methods in HANDLERS.items()}


class DistributionAPI:
    """The OCI distribution API over `registry`, as an ASGI application.

    URLs in Location are paths without a host, or below `public_url` where that is set."""

    def __init__(
        self,
        registry: Registry,
        *,
        limits: RequestLimits | None = None,
        public_url: str | None = None,
        namespaces: Namespaces | None = None,
        authenticator: Authenticator | None = None,
        service: str = "entrepot",
        rate_limit: RateLimit | None = None,
        answer_cache: AnswerCache | None = None,
        cross_site: CrossSiteCheck | None = None,
        body_memory: BodyMemory | None = None,
    ) -> None:
        """`namespaces`: the upstreams that requests may name; None: nothing is mirrored, and `ns` is ignored.
        `authenticator`: None: requests are not authenticated. `service`: the service that tokens are for, in
        challenges. `rate_limit`: None: there is none. `answer_cache`: None: no answer is cached. `cross_site`: None:
        that of a registry without accounts and host names. `body_memory`: the worker's; None: one of its own."""
        self.registry = registry
        self.limits = limits or RequestLimits()
        self._base = (public_url or "").rstrip("/")
        self._namespaces = namespaces
        self._authenticator = authenticator
        self._credential_key = _same_for_all if authenticator is None else authenticator.credential_key
        self._challenges = None if authenticator is None else Challenges(public_url, service)
        self._rate_limit = rate_limit
        self._answer_cache = answer_cache
        self._cross_site = CrossSiteCheck(public_url, (), lambda: True) if cross_site is None else cross_site
        self._body_memory = body_memory or BodyMemory()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self.registry, self.limits, self._base, scope, receive, send, self._body_memory)
        enter_request(exchange)
        try:
            if self._answer_cache is not None and self._answer_cache.record(exchange):
                await self._answer(exchange)
                self._answer_cache.store(exchange)
            else:
                await self._answer(exchange)
        except ClientGone:
            return
        except RegistryError as error:
            if exchange.started:
                log_cut(exchange, error)
                raise
            log_failure(exchange, error)
            error.__traceback__ = error.__context__ = error.__cause__ = None  # they hold the request's body
            await send_error(exchange, error, *self._challenge(exchange, error))
        except Exception as error:
            if exchange.started:
                error.add_note(f"while request {exchange.request_id} was being answered; its connection is cut")
                raise
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                log_failure(exchange, busy := TooManyOpenFiles())
                await send_error(exchange, busy)
                return
            log.exception("request %s (%s) failed", exchange.request_id, exchange.method)
            await send_failure(exchange)

    def answer_at_once(self, scope: Scope) -> tuple[CachedAnswer, str] | None:
        """Returns the cached answer to a request without a body, and the request's id; None: there is none. For a
        server that asks before it calls the application; it only has to send the answer."""
        answer = None if self._answer_cache is None else self._answer_cache.find(scope, self._credential_key)
        if answer is None:
            return None
        address = scope["client"][0] if scope["client"] else ""
        if self._rate_limit is not None and self._rate_limit(rate_key(answer.name, answer.is_account, address)):
            return None
        request_id = new_request_id()
        for log_call in answer.logged_calls:
            log_call(answer.name, address, request_id)
        return answer, request_id

    async def _answer(self, exchange: Exchange) -> None:
        await self._enter(exchange)
        if self._namespaces is not None and exchange.requested_name:
            self._namespaces.apply(exchange)
        if self._authenticator is not None and exchange.kind == "manifests" and exchange.method == "PUT":
            self._authenticator.check_push(exchange.repo)  # before the body is read; the registry is called after it
        handler = HANDLERS[exchange.kind].get(exchange.method)
        if handler is not None:
            await handler(exchange)
        elif exchange.method == "OPTIONS":
            await exchange.send_empty(204, allow_header(exchange.allowed))
        else:
            raise MethodUnknown(f"{exchange.method[:20]} does nothing here")

    async def _enter(self, exchange: Exchange) -> None:
        """Finds the resource and the principal, and counts the request against the rate limit. Requests that are
        refused here count as well: wrong credentials and invalid paths give nobody more requests."""
        try:
            self._route(exchange)
            self._cross_site.check(exchange)
            if self._authenticator is None:
                exchange.principal = UNRESTRICTED
            else:
                await self._authenticator.authenticate(exchange)
        except RegistryError:
            self._count(exchange)
            raise
        self._count(exchange)

    def _count(self, exchange: Exchange) -> None:
        """Counts the request against the rate limit. Raises TooManyRequests."""
        if self._rate_limit is not None:
            check_rate(self._rate_limit, rate_key(exchange.name, exchange.is_account, exchange.address))

    def _route(self, exchange: Exchange) -> None:
        resource = parse_path(raw_path(exchange.scope))
        exchange.kind = resource.kind
        exchange.allowed = _ALLOWED[resource.kind]
        exchange.item = resource.item
        if resource.name or resource.kind not in ("ping", "catalog"):
            exchange.repo = exchange.requested_name = RepositoryName(resource.name)
        if exchange.scope.get("query_string"):
            exchange.query  # noqa: B018  a query that cannot be parsed is refused even where it is not used

    def _challenge(self, exchange: Exchange, error: RegistryError) -> Iterator[Header]:
        if self._challenges is not None and isinstance(error, Unauthorized):
            yield self._challenges.header(exchange, error)


def _same_for_all(shown: Sequence[bytes], address: str) -> bytes:
    """Returns one key for all requests, where they are not authenticated."""
    return b""
