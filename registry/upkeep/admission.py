"""`Admission`: a wrapper of a registry object that refuses pushes before their bytes are received.

A push is refused if its bytes would exceed a quota, or would leave less free space on the disk than the settings
require. The transaction that stores the content checks the quotas again, with the exact sizes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from registry.request import GetPushRefusalReason, current_request
from storage.access import Action
from storage.errors import StorageFull
from storage.interface import Registry
from storage.names import Digest, RepositoryName
from storage.wrappers import Call, ForwardingRegistry

T = TypeVar("T")
_STORING: Final = frozenset({"start_upload", "resume_upload", "mount_blob", "put_manifest"})
"""The calls that store content."""

CheckQuota = Callable[[RepositoryName, int, Digest | None], Awaitable[None]]
"""Called with the repository, the size of a blob in bytes, and the digest of the blob (None: unknown). Raises
QuotaExceeded if the blob would exceed a quota of the repository."""


class Admission(ForwardingRegistry):
    """Passes calls on to `inner`. Refuses a push with StorageFull if the disk is too full, or with QuotaExceeded if the
    push would exceed a quota. `push_refusal_reason` is called with the number of bytes of a push, and returns why
    the disk is too full for them; None: there is enough space. `check_quota` is None if there are no quotas."""

    def __init__(
        self, inner: Registry, push_refusal_reason: GetPushRefusalReason, check_quota: CheckQuota | None
    ) -> None:
        super().__init__(inner)
        self._push_refusal_reason = push_refusal_reason
        self._check_quota = check_quota

    async def handle(self, call: Call[T]) -> T:
        if call.action is Action.PUSH and call.operation in _STORING:
            await self._admit(call)
        return await self.forward(call)

    async def _admit(self, call: Call[T]) -> None:
        """Raises StorageFull or QuotaExceeded if the call must be refused."""
        # What the client states about the blob that the request sends; None: the request sends no blob.
        announced = current_request().announced_blob
        # A request that cancels an upload session first resumes the session, and sends no blob.
        if call.operation == "resume_upload" and announced is None:
            return
        size = announced.size if announced else 0
        adds_no_bytes = call.operation == "resume_upload" and size == 0
        if not adds_no_bytes and (reason := self._push_refusal_reason(size or 0)) is not None:
            raise StorageFull(reason)
        if self._check_quota is not None and announced is not None and size:
            # A request that resumes an upload can state how many bytes of the blob earlier requests have sent. `offset`
            # is this number; 0 if the request does not state it.
            offset = (call.args[1] or 0) if call.operation == "resume_upload" else 0
            await self._check_quota(call.repo, offset + size, announced.digest)
