"""The router through which the web pages and the management API read stored content (`stored_content_router`). It
sends no requests to upstreams, so pages show only the cached part of mirrored content.

A visit to a page must not fetch content, use up an upstream's rate limit, or wait for an upstream that does not
respond.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, TypeVar

from registry.naming import NamingRules
from registry.router import IsConfirmed, IsUsed, Router
from storage.access import Action
from storage.errors import BlobUnknown, Unsupported
from storage.interface import Registry
from storage.names import RepositoryName
from storage.wrappers import Call, ForwardingRegistry

T = TypeVar("T")


def stored_content_router(
    store: Registry,
    naming: NamingRules,
    is_used: IsUsed,
    *,
    private: Collection[str],
    is_confirmed: IsConfirmed,
) -> Router:
    """Returns a router like that of the server, but with `store` in place of each mirror. `is_used`: returns whether
    the store has, or ever had, content of a repository. `private`: the names of the private upstreams, which may have
    repositories that only some clients are allowed to read. `is_confirmed`: returns whether the upstream has confirmed
    that a repository has a blob (`registry.mirror.entitlement`). The router returns a blob of a private upstream only
    if `is_confirmed` returns True."""
    confirmed_blobs = _ConfirmedBlobs(store, is_confirmed)
    mirrors: Iterable[tuple[str, Registry]] = (
        (name, confirmed_blobs if name in private else store) for name in naming.upstreams
    )
    return Router(store, dict(mirrors), is_used, naming, private=private, is_confirmed=is_confirmed)


class _ConfirmedBlobs(ForwardingRegistry):
    """Passes reads to `inner`, but returns only blobs that the upstream has confirmed for their repository."""

    def __init__(self, inner: Registry, is_confirmed: IsConfirmed) -> None:
        super().__init__(inner)
        self._is_confirmed = is_confirmed

    async def handle(self, call: Call[T]) -> T:
        """Forwards a read. Raises BlobUnknown if the call reads a blob that is not confirmed. Raises Unsupported if the
        call is no read."""
        if call.action is not Action.PULL:
            raise Unsupported
        if call.operation in ("open_blob", "resolve_blob"):
            digest: Any = call.args[0]
            if not await self._is_confirmed(RepositoryName(call.repo), digest):
                raise BlobUnknown(f"{call.repo} has no blob {digest}")
        return await self.forward(call)
