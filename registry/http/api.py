"""Everything below `/v2`: one ASGI callable over a Registry.

A handler reads the request, makes its call on the registry, and writes the answer. What goes wrong is raised, and
mapped to an answer in one place: here.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final
from urllib.parse import quote

from registry.http import blobs, listing, manifests, uploads
from registry.http.answer_cache import AnswerCache, CachedAnswer
from registry.http.body_memory import BodyMemory
from registry.http.challenge import Authenticator, Challenges
from registry.http.cross_site import CrossSiteCheck
from registry.http.errors import MethodUnknown, status_of
from registry.http.exchange import (
    ACTING,
    ClientGone,
    Exchange,
    Header,
    Receive,
    RequestLimits,
    Scope,
    Send,
    new_request_id,
)
from registry.http.namespaces import Namespaces
from registry.http.rate_limit import RateLimit, check_rate, rate_key
from registry.http.responses import JSON, REVALIDATE, allow_header, send_empty, send_error, send_failure, send_whole
from registry.http.routing import parse_path
from registry.log_output import mark_logged
from registry.request import NOTICE
from storage.errors import (
    DigestInvalid,
    PartialLost,
    RegistryError,
    StorageFailed,
    StorageFull,
    TooManyOpenFiles,
    Unauthorized,
    UpstreamUnavailable,
)
from storage.interface import Registry
from storage.names import RepositoryName

log = logging.getLogger("registry.http")

Handler = Callable[[Exchange], Awaitable[None]]


async def ping(exchange: Exchange) -> None:
    """Says that this is a registry of version 2 ("Determining Support", end-1). Docker reads a challenge here and
    nowhere else, so who has shown nothing gets one, also where a pull takes nothing."""
    if not exchange.is_admitted:
        raise Unauthorized
    await send_whole(exchange, 200, b"{}", JSON, REVALIDATE)


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
"""What each kind of place does, by method."""

_ALLOWED: Final[Mapping[str, tuple[str, ...]]] = {kind: (*methods, "OPTIONS") for kind, methods in HANDLERS.items()}


def raw_path(scope: Scope) -> bytes:
    """The path as it came, still percent-encoded."""
    raw: bytes | None = scope.get("raw_path")
    return raw if raw is not None else quote(scope["path"]).encode("ascii")


def is_distribution(path: bytes) -> bool:
    """Whether a raw path is `/v2` or lies below it."""
    return path.startswith(b"/v2") and (len(path) == 3 or path[3] == 0x2F)


class DistributionAPI:
    """The OCI distribution API over `registry`, as an ASGI application.

    Addresses in Location are paths without a host, or lie under `public_url` where that is set."""

    def __init__(
        self,
        registry: Registry,
        *,
        limits: RequestLimits | None = None,
        public_url: str | None = None,
        namespaces: Namespaces | None = None,
        authenticator: Authenticator | None = None,
        service: str = "entrepot",
        pace: RateLimit | None = None,
        answers: AnswerCache | None = None,
        pages: CrossSiteCheck | None = None,
        intake: BodyMemory | None = None,
    ) -> None:
        """`namespaces`: the upstreams that requests may name; None: nothing is mirrored, and `ns` means nothing.
        `authenticator`: None: nobody is asked who they are. `service`: what tokens are for, in challenges.
        `pace`: the limit of requests; None: there is none.
        `answers`: None: each request is answered anew. `pages`: refuses what pages in browsers ask for; None: as for a
        registry that is open and has no name. `body_memory`: the worker's, for bodies held in memory; None: one of its
        own."""
        self.registry = registry
        self._intake = intake or BodyMemory()
        self._pages = CrossSiteCheck(public_url, (), lambda: True) if pages is None else pages
        self._answers = answers
        self._known = _everybody if authenticator is None else authenticator.known
        self._pace = pace
        self._namespaces = namespaces
        self._authenticator = authenticator
        self._challenges = None if authenticator is None else Challenges(public_url, service)
        self.limits = limits or RequestLimits()
        self._base = (public_url or "").rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self.registry, self.limits, self._base, scope, receive, send, self._intake)
        ACTING.set(exchange)
        try:
            if self._answers is not None and self._answers.watch(exchange):
                await self._answer(exchange)
                self._answers.keep(exchange)
            else:
                await self._answer(exchange)
        except ClientGone:
            return
        except RegistryError as error:
            if exchange.started:
                _log_cut(exchange, error)
                raise
            _log_failure(exchange, error)
            error.__traceback__ = error.__context__ = error.__cause__ = None  # they hold the body of the request
            await send_error(exchange, error, *self._challenge(exchange, error))
        except Exception as error:
            if exchange.started:
                error.add_note(f"while request {exchange.request_id} was being answered; its connection is cut")
                raise
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                _log_failure(exchange, busy := TooManyOpenFiles())
                await send_error(exchange, busy)
                return
            log.exception("request %s (%s) failed", exchange.request_id, exchange.method)
            await send_failure(exchange)

    def answer_at_once(self, scope: Scope) -> tuple[CachedAnswer, str] | None:
        """The answer to a request without a body, if it is ready, and the id that the request has got: for a server
        that asks before it calls. All that goes with an answer has happened then, but the sending."""
        answer = None if self._answers is None else self._answers.find(scope, self._known)
        if answer is None:
            return None
        address = scope["client"][0] if scope["client"] else ""
        if self._pace is not None and self._pace(rate_key(answer.name, answer.named, address)):
            return None
        request = new_request_id()
        for retell in answer.calls:
            retell(answer.name, address, request)
        return answer, request

    async def _enter(self, exchange: Exchange) -> None:
        """Finds out what the request is about, and who acts in it. One that is refused here counts as well: whoever
        shows wrong credentials, or asks for nothing, has no more requests than others."""
        try:
            self._locate(exchange)
            self._pages.check(exchange)
            if self._authenticator is not None:
                await self._authenticator.authenticate(exchange)
        except RegistryError:
            self._take(exchange)
            raise
        self._take(exchange)

    def _locate(self, exchange: Exchange) -> None:
        place = parse_path(raw_path(exchange.scope))
        exchange.kind = place.kind
        exchange.allowed = _ALLOWED[place.kind]
        exchange.item = place.item
        if place.name or place.kind not in ("ping", "catalog"):
            exchange.repo = exchange.asked = RepositoryName(place.name)
        if exchange.scope.get("query_string"):
            exchange.query  # noqa: B018  a query that cannot be read is refused even where nothing in it is wanted

    def _take(self, exchange: Exchange) -> None:
        """Counts the request. Raises TooManyRequests."""
        if self._pace is not None:
            check_rate(self._pace, rate_key(exchange.name, exchange.named, exchange.address))

    async def _answer(self, exchange: Exchange) -> None:
        await self._enter(exchange)
        if self._namespaces is not None and exchange.asked:
            NOTICE.set(None)
            self._namespaces.enter(exchange)
        if self._authenticator is not None and exchange.kind == "manifests" and exchange.method == "PUT":
            self._authenticator.check_push(exchange.repo)  # all of its body is read before the registry is asked
        handler = HANDLERS[exchange.kind].get(exchange.method)
        if handler is not None:
            await handler(exchange)
        elif exchange.method == "OPTIONS":
            await send_empty(exchange, 204, allow_header(exchange.allowed))
        else:
            raise MethodUnknown(f"{exchange.method[:20]} does nothing here")

    def _challenge(self, exchange: Exchange, error: RegistryError) -> Iterator[Header]:
        if self._challenges is not None and isinstance(error, Unauthorized):
            yield self._challenges.header(exchange, error)


def _everybody(shown: Sequence[bytes], address: str) -> bytes:
    """Where nobody is asked who they are, all are the same."""
    return b""


def _log_failure(exchange: Exchange, error: RegistryError) -> None:
    """What is nobody's request's fault is the operator's to know."""
    status = status_of(error)
    if status >= 500:
        level = logging.WARNING if isinstance(error, UpstreamUnavailable | PartialLost) else logging.ERROR
        text = f"request {exchange.request_id} answered {status} {error.code}: {_in_full(error)}"
        log.log(level, "%s", text, exc_info=error if _is_strange(error) else None)


def _log_cut(exchange: Exchange, error: RegistryError) -> None:
    """An answer that breaks off after its headers. One line, whoever sees the error next: none of these is a fault of
    the program. What was wrong with an upstream's bytes has been logged by who fetched them."""
    if isinstance(error, StorageFull | StorageFailed):
        level = logging.ERROR
    else:
        level = logging.INFO if isinstance(error, DigestInvalid) else logging.WARNING
    text = f"request {exchange.request_id} was cut off, {error.code}: {_in_full(error)}"
    log.log(level, "%s", text, exc_info=error if _is_strange(error) else None)
    mark_logged(error)


def _in_full(error: RegistryError) -> str:
    """With what the disk said."""
    return f"{error} ({error.__cause__})" if isinstance(error.__cause__, OSError) else str(error)


def _is_strange(error: RegistryError) -> bool:
    """Whether it takes a traceback to understand: the store failed, and not because of what the disk said."""
    return isinstance(error, StorageFailed) and error.__cause__ is not None and _in_full(error) == str(error)
