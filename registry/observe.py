"""`Observed`: writes one log line for each call on a registry.

A line holds `key=value` pairs: the operation, the repository and reference, the outcome, the duration, and who called.
The reason for a failure is logged where the failure is answered.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from types import TracebackType
from typing import Any, Final, TypeVar, cast

from registry.request import current_request
from storage.content import Actor, Descriptor
from storage.errors import RegistryError
from storage.interface import BlobWriter
from storage.names import Digest, RepositoryName
from storage.wrappers import Call, ForwardingRegistry

log = logging.getLogger("registry.calls")

T = TypeVar("T")
_OPENS_WRITER: Final = frozenset({"start_upload", "resume_upload"})


class _CallLine:
    """A context manager around one call: writes its line when the block ends, however it ends."""

    __slots__ = ("_begun", "_by", "_operation", "_reference", "_repo")

    def __init__(self, operation: str, repo: str, reference: str, by: Actor | None = None) -> None:
        self._operation = operation
        self._repo = repo
        self._reference = reference
        self._by = by
        self._begun = time.perf_counter()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        request = current_request()
        caller = self._by or request
        if error is None:
            outcome = "OK"
            if request.logged_calls is not None:
                line = partial(_write_cached_line, self._operation, self._repo, self._reference)
                request.logged_calls.append(line)
        else:
            outcome = error.code if isinstance(error, RegistryError) else type(error).__name__
        milliseconds = (time.perf_counter() - self._begun) * 1000
        _write_line(
            *(self._operation, self._repo, self._reference, outcome, milliseconds),
            *(caller.name, caller.address, caller.request_id),
        )


def _write_line(
    operation: str,
    repo: str,
    reference: str,
    outcome: str,
    milliseconds: float,
    name: str,
    address: str,
    request_id: str,
) -> None:
    log.info(
        "operation=%s repository=%s reference=%s outcome=%s ms=%.1f actor=%s address=%s request=%s",
        operation,
        repo or "-",
        reference or "-",
        outcome,
        milliseconds,
        name,
        address or "-",
        request_id or "-",
    )


def _write_cached_line(operation: str, repo: str, reference: str, name: str, address: str, request_id: str) -> None:
    """Writes the line of a call that was not made, since the response cache had the answer."""
    _write_line(operation, repo, reference, "OK", 0.0, name, address, request_id)


class _ObservedWriter:
    """An upload session; its commit or cancellation gets a line. `write` is the session's own method, since it is
    called for every chunk."""

    def __init__(self, inner: BlobWriter, repo: RepositoryName) -> None:
        self._inner = inner
        self._repo = repo
        self.id = inner.id
        self.write = inner.write
        self.read_at = inner.read_at
        self.aclose = inner.aclose

    @property
    def offset(self) -> int:
        return self._inner.offset

    async def commit(self, digest: Digest) -> Descriptor:
        if not log.isEnabledFor(logging.INFO):
            return await self._inner.commit(digest)
        with _CallLine("commit_upload", self._repo, digest):
            return await self._inner.commit(digest)

    async def cancel(self) -> None:
        if not log.isEnabledFor(logging.INFO):
            await self._inner.cancel()
            return
        with _CallLine("cancel_upload", self._repo, self.id):
            await self._inner.cancel()


class Observed(ForwardingRegistry):
    """`inner`, with a log line for each call."""

    async def handle(self, call: Call[T]) -> T:
        if not log.isEnabledFor(logging.INFO):
            return await call.on(self.inner)
        with _CallLine(call.operation, call.repo, call.reference, call.by):
            result: Any = await call.on(self.inner)
        if call.operation in _OPENS_WRITER:
            result = _ObservedWriter(result, call.repo)
        return cast(T, result)
