"""`Admission`: wraps a registry object. If the bytes of a push do not fit into the store, refuses the push before the
bytes are received.

The bytes do not fit if they would exceed a quota, or if the disk would then have less free space than the settings
require. The transaction that stores the content checks the quotas again, with the exact sizes.
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
    QuotaExceeded. `push_refusal` gets the number of bytes of a push. It returns why the disk is too full for these
    bytes, or None if the bytes fit. `check_quota`: checks the quotas; None: there are no quotas."""

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
        # The size and the digest of the blob in the request, as the client states them; None: the request has no blob.
        announced = current_request().announced_blob
        if call.operation == "resume_upload" and announced is None:
            return  # the request resumes the session only to cancel it
        size = announced.size if announced else 0
        is_without_body = call.operation == "resume_upload" and size == 0  # adds no bytes to the session
        if not is_without_body and (reason := self._push_refusal(size or 0)) is not None:
            raise StorageFull(reason)
        if self._check_quota is not None and announced is not None and size:
            # If the request names the offset of a chunk in the session, the bytes before the chunk count as well.
            offset = (call.args[1] or 0) if call.operation == "resume_upload" else 0
            await self._check_quota(call.repo, offset + size, announced.digest)
