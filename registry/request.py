"""The context of the request that is being served (`RequestContext`), such as its principal and its client.

The *principal* is the account, or the anonymous client, that makes the request. Code outside `registry.http` reads the
context with `current_request()`. The context is stored in a context variable, the only one in this program. A task that
outlives its request, or that works for several requests, is started with `detached_context()`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from typing import Final, NamedTuple, Protocol, final

from storage.access import Action
from storage.content import Actor
from storage.errors import RegistryError
from storage.names import Digest

USER_AGENT_CHARACTERS: Final = 256
"""Largest length of a User-Agent in an `Actor`. A longer User-Agent is cut."""

GetPushRefusalReason = Callable[[int], str | None]
"""A function that takes the number of bytes of a push. Returns a sentence that says why the push does not fit on the
disk; None if it fits."""


class RequestInvalid(RegistryError):
    """The request cannot be parsed, or asks for more than a limit allows. The OCI spec has no error code for this."""

    code = "UNSUPPORTED"
    default = "the request cannot be read"  # the message of an error whose constructor gets no message


class ActingPrincipal(Protocol):
    """The account or anonymous client that makes a request, with its rights: the part of
    `registry.auth.rights.principal.Principal` that code outside `registry.auth` needs."""

    @property
    def name(self) -> str:
        """The account's name, or the name of anonymous clients."""
        ...

    @property
    def is_anonymous(self) -> bool:
        """True for an anonymous client, False for an account."""
        ...

    @property
    def is_admitted(self) -> bool:
        """Whether the request had a valid credential, or needs none because there are no accounts."""
        ...

    def may(self, action: Action, stored_name: str, requested_name: str | None = None, /) -> bool:
        """Returns whether the principal may do `action` on a repository. `stored_name`: the repository's name in the
        store, such as `docker.io/library/ubuntu`. `requested_name`: the name that the client used, such as `ubuntu`;
        None: the client used the stored name. A bearer token may contain either name."""
        ...


@final
class _WithoutAccount:
    """An anonymous client as principal. It has all rights if `is_admitted` is True, otherwise none."""

    __slots__ = ("is_admitted", "is_anonymous", "name")

    def __init__(self, *, is_admitted: bool) -> None:
        self.name = Actor().name
        self.is_anonymous = True
        self.is_admitted = is_admitted

    def may(self, action: Action, stored_name: str, requested_name: str | None = None, /) -> bool:
        return self.is_admitted


UNAUTHENTICATED: Final = _WithoutAccount(is_admitted=False)
"""The principal of a request that has not been authenticated yet. It may do nothing."""
UNRESTRICTED: Final = _WithoutAccount(is_admitted=True)
"""The principal of every request to a registry without an authenticator. It may do everything."""


class AnnouncedBlob(NamedTuple):
    """The size and the digest that a request states for a blob. The request sends the whole blob, or a part of it.

    - `size`: number of bytes of the request's body; None: the request does not state it.
    - `digest`: the digest of the whole blob; None: the request does not state it."""

    size: int | None
    digest: Digest | None


class RequestContext:
    """One request, as code outside `registry.http` sees it.

    - `principal`: the account or anonymous client that makes the request.
    - `requested_name`: the repository's name as the client wrote it; empty: the request names no repository.
    - `address`: the client's IP address; empty: unknown.
    - `request_id`: identifies the request in logs and in the response.
    - `notice`: a warning to send with the response; None: no warning.
    - `announced_blob`: the blob that the request sends; None: the request sends no blob.
    - `cache_state`: where a mirror found the answer: `hit`, `miss`, `stale` or `revalidated` (see `set_cache_state`);
      empty: the answer is not from a mirror.
    - `upstream`: the name of the mirrored upstream; empty: the answer is not from a mirror."""

    __slots__ = (
        "address",
        "announced_blob",
        "cache_state",
        "notice",
        "principal",
        "request_id",
        "requested_name",
        "upstream",
    )

    def __init__(
        self,
        principal: ActingPrincipal = UNAUTHENTICATED,
        requested_name: str = "",
        address: str = "",
        request_id: str = "",
    ) -> None:
        self.principal = principal
        self.requested_name = requested_name
        self.address = address
        self.request_id = request_id
        self.notice: str | None = None
        self.announced_blob: AnnouncedBlob | None = None
        self.cache_state = ""
        self.upstream = ""

    def headers(self, name: bytes) -> list[bytes]:
        """Returns the values of a request header, in the order in which they were sent. `name` is in lower case. This
        implementation returns an empty list; the subclass for HTTP requests overrides it."""
        return []

    @property
    def principal_name(self) -> str:
        """The name of the principal."""
        return self.principal.name

    @property
    def actor(self) -> Actor:
        """The principal's name and the client, in the form that the audit log and the tag history store."""
        agents = self.headers(b"user-agent")
        return make_actor(self.principal_name, self.address, self.request_id, agents[0] if agents else b"")

    def may_pull(self, stored_name: str) -> bool:
        """Returns whether the principal may pull from the repository with this name in the store."""
        return self.principal.may(Action.PULL, stored_name, self.requested_name or stored_name)


@final
class _NoRequest(RequestContext):
    """The context of background work. Its attributes cannot be set, so that no code can give rights to such work."""

    __slots__ = ()

    def __init__(self) -> None:
        fields = {"principal": UNAUTHENTICATED, "requested_name": "", "address": "", "request_id": "", "notice": None}
        for field, value in {**fields, "announced_blob": None, "cache_state": "", "upstream": ""}.items():
            object.__setattr__(self, field, value)

    def __setattr__(self, field: str, value: object) -> None:
        raise AttributeError(f"there is no request, so its {field} cannot be set")


NO_REQUEST: Final = _NoRequest()
"""The current context of code that serves no request, such as background work."""
_CURRENT: Final[ContextVar[RequestContext]] = ContextVar("request", default=NO_REQUEST)

# These are methods of the context variable itself, because a wrapper function would cost time in every request.
current_request: Final = _CURRENT.get
"""Returns the context of the request being served, or `NO_REQUEST`."""
enter_request: Final = _CURRENT.set
"""Makes a `RequestContext` the current one in this task. Returns a token for `leave_request`."""
leave_request: Final = _CURRENT.reset
"""Undoes a call of `enter_request`. Takes the token that the call returned."""


def set_cache_state(state: str, upstream: str) -> None:
    """Records where the mirror of `upstream` found the answer to the current request, for the log and the metrics. Does
    nothing outside a request.

    `state`: `hit` (in the cache), `miss` (at the upstream), `stale` (in the cache, although it may be out of date) or
    `revalidated` (in the cache, after the upstream has confirmed it)."""
    request = current_request()
    if request is not NO_REQUEST:
        request.cache_state = state
        request.upstream = upstream


def set_notice(text: str) -> None:
    """Makes the response to the current request have a header `Warning: 299` with `text` (RFC 7234, 5.5). Replaces the
    text of an earlier call. Does nothing outside a request."""
    request = current_request()
    if request is not NO_REQUEST:
        request.notice = text


def detached_context() -> Context:
    """Returns a copy of the current context variables with `NO_REQUEST` as the current request, for
    `asyncio.create_task(…, context=…)`. Use it for a task that outlives its request, or that works for several
    requests. Such a task must not act with the rights of a request, and must not keep a request in memory."""
    context = copy_context()
    context.run(enter_request, NO_REQUEST)
    return context


def make_actor(name: str, address: str, request_id: str, user_agent: bytes) -> Actor:
    """Returns the actor that the audit log names for a request. Cuts the User-Agent to `USER_AGENT_CHARACTERS`."""
    return Actor(name, address, request_id, user_agent[:USER_AGENT_CHARACTERS].decode("latin-1"))
