"""`DistributionAPI`: the OCI distribution API below `/v2`, as one ASGI application over a registry.

Each kind of resource has a handler for each HTTP method that it supports. A handler parses the request, calls the
registry and sends the response. If a handler raises an error, `DistributionAPI` sends the error response.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Final

from registry.asgi import REQUEST_NOTES_EXTENSION, Header, Receive, Scope, Send, raw_path, request_id_of
from registry.http import blobs, extensions, listing, manifests, uploads
from registry.http.answer_cache import AnswerCache, CachedAnswer
from registry.http.body_memory import BodyMemory
from registry.http.cross_site import CrossSiteCheck
from registry.http.disconnect import ClientGone
from registry.http.error_responses import log_cut_off, log_server_error, send_error, send_internal_error
from registry.http.error_statuses import MethodUnknown
from registry.http.exchange import CountPull, Exchange, RequestLimits
from registry.http.namespaces import Namespaces
from registry.http.rate_limit import RateLimit, check_rate, rate_key
from registry.http.resource_path import parse_path
from registry.http.response_headers import JSON, REVALIDATE, allow_header
from registry.http.www_authenticate import Authenticator, Challenges
from registry.request import UNRESTRICTED, GetPushRefusalReason, enter_request
from storage.errors import RegistryError, StorageFull, TooManyOpenFiles, Unauthorized
from storage.interface import Registry
from storage.names import RepositoryName

log = logging.getLogger("registry.http")

Handler = Callable[[Exchange], Awaitable[None]]
"""Sends the response to one request, or raises an error. If the handler has sent the status before the error, the
connection is closed."""


async def ping(exchange: Exchange) -> None:
    """Tells the client that this server supports the distribution API ("Determining Support", end-1).

    If the registry has accounts, raises Unauthorized for a request without credentials, even if everybody may pull:
    Docker logs in only after a 401 to this request."""
    if not exchange.principal.is_admitted:
        raise Unauthorized
    await exchange.send_whole(200, b"{}", JSON, REVALIDATE)


HANDLERS: Final[Mapping[str, Mapping[str, Handler]]] = MappingProxyType(
    {
        "ping": {"GET": ping, "HEAD": ping},
        "catalog": {"GET": listing.list_repositories, "HEAD": listing.list_repositories},
        "extensions": {"GET": extensions.list_extensions, "HEAD": extensions.list_extensions},
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
"""The handlers by kind of resource (`resource_path.Resource`) and by method. `DistributionAPI` adds the handlers of
the kind `history`."""

_ALLOWED_METHODS: Final[Mapping[str, tuple[str, ...]]] = {
    **{kind: (*methods, "OPTIONS") for kind, methods in HANDLERS.items()},
    "history": ("GET", "HEAD", "OPTIONS"),
}
"""The methods that each kind of resource supports, for the Allow header."""


class DistributionAPI:
    """The OCI distribution API over `registry`, as an ASGI application.

    Location headers are URLs below `public_url`, or paths without a host if `public_url` is None."""

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
        count_pull: CountPull | None = None,
        push_refusal_reason: GetPushRefusalReason | None = None,
        read_history: extensions.ReadHistory = extensions.refuse_history,
    ) -> None:
        """None switches an option off, unless the line of the option says what None means.

        - `limits`: the limits of one request. None: the default limits.
        - `namespaces`: the upstreams that requests can name, by the query parameter `ns` or by the Host header. None:
          nothing is mirrored, and `ns` is ignored.
        - `authenticator`: finds the account that makes a request. None: every request may do everything.
        - `service`: the name of this registry in the challenges of 401 responses.
        - `rate_limit`: counts the requests of each client.
        - `answer_cache`: the response cache.
        - `cross_site`: refuses requests that a browser sends on behalf of a page of another site. None: the check uses
          the host of `public_url` as the only host name, and assumes that the registry has no accounts.
        - `body_memory`: the memory budgets of the worker. None: new budgets with the default sizes.
        - `count_pull`: counts each pull of a manifest, including pulls that get a cached response.
        - `read_history`: reads the history of a tag for the current request.
        - `push_refusal_reason`: returns why a manifest of a given size does not fit on the disk, or None if it fits.
          Called before the manifest is received. The registry checks the free space again when it has received the
          manifest."""
        self.registry = registry
        self.limits = limits or RequestLimits()
        self._base_url = (public_url or "").rstrip("/")
        self._namespaces = namespaces
        self._authenticator = authenticator
        # This function returns the credential key of a request, which identifies the account or anonymous client.
        # The credential key is a part of the key under which a response is cached.
        self._make_credential_key = _same_credential_key if authenticator is None else authenticator.credential_key
        self._challenges = None if authenticator is None else Challenges(public_url, service)
        self._rate_limit = rate_limit
        self._answer_cache = answer_cache
        self._cross_site = cross_site or CrossSiteCheck(public_url, hosts=(), has_no_accounts=lambda: True)
        self._body_memory = body_memory or BodyMemory()
        self._count_pull = count_pull
        self._push_refusal_reason = push_refusal_reason
        list_history = partial(extensions.list_history, read=read_history)
        self._handlers: Mapping[str, Mapping[str, Handler]] = {
            **HANDLERS,
            "history": {"GET": list_history, "HEAD": list_history},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self.registry, self.limits, self._base_url, scope, receive, send, self._body_memory)
        notes = (scope.get("extensions") or {}).get(REQUEST_NOTES_EXTENSION)
        if notes is not None:
            notes["exchange"] = exchange  # for the `RequestRecorder`; the server empties `notes` after the request
        enter_request(exchange)
        try:
            if self._answer_cache is not None and self._answer_cache.start_recording(exchange):
                await self._answer(exchange)
                self._answer_cache.save(exchange, self._make_credential_key)
            else:
                await self._answer(exchange)
        except ClientGone:
            return  # the client cannot receive a response any more
        except RegistryError as error:
            if exchange.response_started:
                log_cut_off(exchange, error)
                raise  # the server then closes the connection, so the client sees that the response is incomplete
            log_server_error(exchange, error)
            # The tracebacks would keep the request's body in memory while the response is sent.
            error.__traceback__ = error.__context__ = error.__cause__ = None
            await send_error(exchange, error, *self._challenge_headers(exchange, error))
        except Exception as error:
            if exchange.response_started:
                error.add_note(f"while request {exchange.request_id} was being answered; its connection is closed")
                raise
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                too_many_files = TooManyOpenFiles()
                log_server_error(exchange, too_many_files)
                await send_error(exchange, too_many_files)
                return
            log.exception("request %s (%s) failed", exchange.request_id, exchange.method)
            await send_internal_error(exchange)

    def answer_at_once(self, scope: Scope) -> tuple[CachedAnswer, str] | None:
        """Returns the cached response to a request without a body, and the id of the request. Counts the request under
        the rate limit, and also as a pull if it pulls a manifest. Returns None if no response is cached or the rate
        limit is reached. After None, the server must call the application."""
        answer = None if self._answer_cache is None else self._answer_cache.find(scope, self._make_credential_key)
        if answer is None:
            return None
        address = scope["client"][0] if scope["client"] else ""
        if self._rate_limit is not None:
            key = rate_key(answer.principal_name, answer.has_account, address)
            if self._rate_limit(key):
                return None  # the application answers 429
        request_id = request_id_of(scope["headers"])
        if answer.pull is not None and self._count_pull is not None:
            self._count_pull(answer.pull, answer.principal_name, address, request_id)
        return answer, request_id

    async def _answer(self, exchange: Exchange) -> None:
        """Checks the request and runs its handler, which sends the response."""
        await self._route_and_authenticate(exchange)
        if self._namespaces is not None and exchange.requested_name:
            self._namespaces.apply(exchange)
        if exchange.kind == "manifests" and exchange.method == "PUT":
            self._check_manifest_push(exchange)
        handler = self._handlers[exchange.kind].get(exchange.method)
        if handler is not None:
            try:
                await handler(exchange)
            finally:  # the pull counts even if the client disconnects before it has the whole manifest
                if exchange.pull is not None and self._count_pull is not None:
                    self._count_pull(exchange.pull, exchange.principal_name, exchange.address, exchange.request_id)
        elif exchange.method == "OPTIONS":
            await exchange.send_empty(204, allow_header(exchange.allowed_methods))
        else:
            raise MethodUnknown(f"this resource does not support the method {exchange.method[:20]}")

    def _check_manifest_push(self, exchange: Exchange) -> None:
        """Checks, before the body is received, that the client may push and that the manifest fits on the disk. The
        registry checks both again after it has received the body. Raises Unauthorized, Denied, StorageFull."""
        if self._authenticator is not None:
            self._authenticator.check_push(exchange.repo)
        if self._push_refusal_reason is not None:
            # A manifest above the size limit is refused later because of its size.
            size = min(exchange.length or 0, self.limits.manifest_bytes)
            if (reason := self._push_refusal_reason(size)) is not None:
                raise StorageFull(reason)

    async def _route_and_authenticate(self, exchange: Exchange) -> None:
        """Finds the resource, authenticates the request and counts it under the rate limit. Also counts refused
        requests, so that the limit applies to clients that try wrong credentials."""
        try:
            self._route(exchange)
            self._cross_site.check(exchange.scope)
            if self._authenticator is None:
                exchange.principal = UNRESTRICTED
            else:
                await self._authenticator.authenticate(exchange)
        except RegistryError:
            self._count_request(exchange)
            raise
        self._count_request(exchange)

    def _count_request(self, exchange: Exchange) -> None:
        """Counts the request. Raises TooManyRequests if the rate limit is reached."""
        if self._rate_limit is not None:
            check_rate(self._rate_limit, rate_key(exchange.principal_name, exchange.has_account, exchange.address))

    def _route(self, exchange: Exchange) -> None:
        """Sets the attributes of `exchange` that name the resource. Raises PathUnknown or NameInvalid for an invalid
        path, and RequestInvalid for an invalid query."""
        resource = parse_path(raw_path(exchange.scope))
        exchange.kind = resource.kind
        exchange.allowed_methods = _ALLOWED_METHODS[resource.kind]
        exchange.resource_id = resource.resource_id
        if resource.name or resource.kind not in ("ping", "catalog", "extensions"):
            exchange.repo = exchange.requested_name = RepositoryName(resource.name)
        if exchange.scope.get("query_string"):
            exchange.query  # noqa: B018  raises for an invalid query, even if the handler does not read the query

    def _challenge_headers(self, exchange: Exchange, error: RegistryError) -> Iterator[Header]:
        """Yields the WWW-Authenticate header for the response to `error`, if the response has the status 401."""
        if self._challenges is not None and isinstance(error, Unauthorized):
            yield self._challenges.header(exchange, error)


def _same_credential_key(authorization: Sequence[bytes], address: str) -> bytes:
    """Returns the credential key of a request in a registry without an authenticator: one constant, because all
    requests have the same rights."""
    return b""
