"""`Restricted`: a wrapper that makes a registry read-only, or refuses deletes (the settings `read_only` and
`delete`)."""

from __future__ import annotations

from typing import TypeVar

from storage.access import Action
from storage.errors import Unsupported
from storage.interface import Registry
from storage.wrappers import Call, ForwardingRegistry

T = TypeVar("T")


class Restricted(ForwardingRegistry):
    """Forwards each call to `inner`. A forbidden call raises Unsupported instead.

    `read_only`: True forbids pushes and deletes. `delete`: False forbids deletes."""

    def __init__(self, inner: Registry, *, read_only: bool = False, delete: bool = True) -> None:
        super().__init__(inner)
        self._refusals: dict[Action, str] = {}  # the error text for each forbidden action
        if not delete:
            self._refusals[Action.DELETE] = "this registry does not let clients delete content"
        if read_only:
            self._refusals |= dict.fromkeys((Action.PUSH, Action.DELETE), "this registry is read-only")

    async def handle(self, call: Call[T]) -> T:
        if (reason := self._refusals.get(call.action)) is not None:
            raise Unsupported(reason)
        return await self.forward(call)


def restrict(registry: Registry, *, read_only: bool, delete: bool) -> Registry:
    """Returns `registry` with the restrictions of `Restricted`. Returns `registry` itself if nothing is forbidden."""
    if delete and not read_only:
        return registry
    return Restricted(registry, read_only=read_only, delete=delete)
