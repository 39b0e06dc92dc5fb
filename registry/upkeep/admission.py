"""`Admission`: a wrapper of a registry object that refuses a push before its bytes are received, if they do not fit
into the store.

A push is refused if a quota would be exceeded, or if less of the disk would stay free than the settings require. The
transaction that stores the content checks the quotas again, with the exact sizes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from registry.request import PushRefusal, current_request
from storage.access import Action
from storage.errors import StorageFull
from storage.interface import Registry
from storage.names import Digest, RepositoryName
from storage.wrappers import Call, ForwardingRegistry

T = TypeVar("T")
_STORING: Final = frozenset({"start_upload", "resume_upload", "mount_blob", "put_manifest"})
"""The calls that store content."""

CheckQuota = Callable[[RepositoryName, int, Digest | None], Awaitable[None]]
"""Raises QuotaExceeded if a blob of this size does not fit into the quotas of the repository. The digest is None if it
is not known."""


class Admission(ForwardingRegistry):
    """Passes each call on to `inner`, except pushes whose content does not fit: these raise StorageFull or
    QuotaExceeded. `push_refusal` gets the number of bytes of a push, and returns why the disk is too full for them;
    None: it is not. `check_quota`: checks the quotas; None: there are no quotas."""

    def __init__(self, inner: Registry, push_refusal: PushRefusal, check_quota: CheckQuota | None) -> None:
        super().__init__(inner)
        self._push_refusal = push_refusal
        self._check_quota = check_quota

    async def handle(self, call: Call[T]) -> T:
        if call.action is Action.PUSH and call.operation in _STORING:
            await self._admit(call)
        return await self.forward(call)

    async def _admit(self, call: Call[T]) -> None:
        """Raises StorageFull or QuotaExceeded if the content that the call stores does not fit."""
        # The size and digest that the request states for the blob that it sends; None: it sends no blob.
        announced = current_request().announced_blob
        if call.operation == "resume_upload" and announced is None:
            return  # the request resumes the session only to cancel it
        size = announced.size if announced else 0
        is_without_body = call.operation == "resume_upload" and size == 0  # adds no bytes to the session
        if not is_without_body and (reason := self._push_refusal(size or 0)) is not None:
            raise StorageFull(reason)
        if self._check_quota is not None and announced is not None and size:
            # A chunk is checked together with the bytes before it, if the request names its offset in the session.
            offset = (call.args[1] or 0) if call.operation == "resume_upload" else 0
            await self._check_quota(call.repo, offset + size, announced.digest)
