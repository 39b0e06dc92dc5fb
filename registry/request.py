"""The context of the request being served: who acts, which repository name it asked for, where it came from.

Code below HTTP reads it instead of taking these values through every signature. It holds the only context variable of
the product. A task that outlives its request, or that works for several requests, starts in `detached_context()`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from typing import Final, Protocol, final

from storage.access import Action
from storage.content import Actor
from storage.errors import RegistryError

USER_AGENT_CHARACTERS: Final = 256
"""Characters of a User-Agent that are kept; the rest is cut off."""

LogCall = Callable[[str, str, str], None]
"""Writes the log line of a call once more, for a principal's name, an address and a request id."""


class RequestInvalid(RegistryError):
    """A request that cannot be parsed. The OCI spec has no error code for it."""

    code = "UNSUPPORTED"
    default = "the request cannot be read"


class ActingPrincipal(Protocol):
    """The part of `registry.auth.rights.principal.Principal` that code outside `registry.auth` needs."""

    @property
    def name(self) -> str: ...

    @property
    def is_anonymous(self) -> bool:
        """Whether no account acts."""
        ...

    @property
    def is_admitted(self) -> bool:
        """Whether a credential was shown, or none is needed."""
        ...

    def may(self, action: Action, stored: str, asked: str | None = None) -> bool:
        """Returns whether `action` is allowed on the repository stored as `stored`, requested under the name
        `asked`."""
        ...


@final
class _WithoutAccount:
    """A principal for requests that no authenticator has seen."""

    __slots__ = ("is_admitted", "is_anonymous", "name")

    def __init__(self, *, is_admitted: bool) -> None:
        self.name = Actor().name
        self.is_anonymous = True
        self.is_admitted = is_admitted

    def may(self, action: Action, stored: str, asked: str | None = None) -> bool:
        return self.is_admitted


UNAUTHENTICATED: Final = _WithoutAccount(is_admitted=False)
"""The principal of a request until it is authenticated: nothing is allowed."""
UNRESTRICTED: Final = _WithoutAccount(is_admitted=True)
"""The principal of a request where there is no authenticator: everything is allowed."""


class RequestContext:
    """One request, as code below HTTP sees it.

    `principal`: who acts. `requested_name`: the repository's name as the client wrote it, empty where the request names
    none. `address`: the client's, empty where it has none. `notice`: a warning to send with the answer.
    `logged_calls`: the log lines of the calls made so far, recorded only while it is a list."""

    __slots__ = ("address", "logged_calls", "notice", "principal", "request_id", "requested_name")

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
        self.logged_calls: list[LogCall] | None = None

    def headers(self, name: bytes) -> list[bytes]:
        """Returns each value of a header, in order. `name` is in lower case. Empty outside HTTP."""
        return []

    @property
    def name(self) -> str:
        return self.principal.name

    @property
    def actor(self) -> Actor:
        """Who acts and from where, for the audit log and for tag history."""
        agents = self.headers(b"user-agent")
        return make_actor(self.name, self.address, self.request_id, agents[0] if agents else b"")

    def may_pull(self, stored: str) -> bool:
        """Returns whether the principal may pull from a repository, given by its stored name."""
        return self.principal.may(Action.PULL, stored, self.requested_name or stored)


@final
class _NoRequest(RequestContext):
    """The context outside any request. It cannot be changed, so that no caller can give rights to background work."""

    __slots__ = ()

    def __init__(self) -> None:
        fields = {"principal": UNAUTHENTICATED, "requested_name": "", "address": "", "request_id": ""}
        for field, value in {**fields, "notice": None, "logged_calls": None}.items():
            object.__setattr__(self, field, value)

    def __setattr__(self, field: str, value: object) -> None:
        raise AttributeError(f"there is no request, so its {field} cannot be set")


NO_REQUEST: Final = _NoRequest()
_CURRENT: Final[ContextVar[RequestContext]] = ContextVar("request", default=NO_REQUEST)

# The variable's own methods: a Python function around them would cost every request a frame.
current_request: Final = _CURRENT.get
"""Returns the context of the request being served, or `NO_REQUEST`."""
enter_request: Final = _CURRENT.set
"""Makes a context the current one for this task. Returns the token that `leave_request` takes."""
leave_request: Final = _CURRENT.reset
"""Restores the context that `enter_request` replaced."""


def set_notice(text: str) -> None:
    """Sends `text` with the answer to the current request, as `Warning: 299` (RFC 7234, 5.5). Outside a request it is
    dropped."""
    request = current_request()
    if request is not NO_REQUEST:
        request.notice = text


def detached_context() -> Context:
    """Returns a copy of the current context without a request, for `asyncio.create_task(…, context=…)`. A task that
    outlives its request, or serves several, must not act for one of them or keep its memory."""
    context = copy_context()
    context.run(enter_request, NO_REQUEST)
    return context


def make_actor(name: str, address: str, request_id: str, user_agent: bytes) -> Actor:
    """Returns who acts in a request; the User-Agent is cut to `USER_AGENT_CHARACTERS`."""
    return Actor(name, address, request_id, user_agent[:USER_AGENT_CHARACTERS].decode("latin-1"))
