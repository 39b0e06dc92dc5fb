"""`Observed`: a wrapper around a registry. It measures each call on the registry, and logs each call in one line at the
level DEBUG.

The line has `key=value` pairs for the operation, the repository, the reference, the outcome, the milliseconds that the
call took, the actor's name and address, and the request's id. The *actor* is who makes the call: the client of the
request, a command, or the server itself. The outcome is `OK`, the code of a RegistryError, or the class name of
another exception. The line does not give the reason for a failure: `registry.http.error_responses` logs the reason.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager
from typing import Any, Final, TypeVar, cast

from registry.request import current_request
from storage.content import Actor, Descriptor
from storage.errors import RegistryError
from storage.interface import BlobWriter, Registry
from storage.names import Digest, RepositoryName
from storage.wrappers import Call, ForwardingRegistry

log = logging.getLogger("registry.calls")

T = TypeVar("T")
A = TypeVar("A")
OnCall = Callable[[str, float], None]
"""A function that is called after each call on the registry. Its arguments are the call's operation and duration in
seconds. It must return immediately and raise nothing."""
TraceCall = Callable[[str, str], AbstractContextManager[object]]
"""A function that returns a context manager, inside which a call on the registry is made. Its arguments are the call's
operation and repository."""
_WRITER_OPERATIONS: Final = frozenset({"start_upload", "resume_upload"})
"""The methods of a registry that return an upload session."""


async def log_call(
    make_call: Callable[[A], Awaitable[T]],
    argument: A,
    operation: str,
    repo: str,
    reference: str,
    by: Actor | None = None,
) -> T:
    """Awaits `make_call(argument)` and returns its result. If the log level is DEBUG, writes the log line of the call,
    even if the call raised an error.

    `by`: the actor of the call; None: the client of the current request."""
    if not log.isEnabledFor(logging.DEBUG):
        return await make_call(argument)
    outcome, started = "OK", time.perf_counter()
    request = current_request()
    try:
        return await make_call(argument)
    except RegistryError as error:
        outcome = error.code
        raise
    except BaseException as error:
        outcome = type(error).__name__
        raise
    finally:
        origin = by or request  # both have an address and a request id
        log.debug(
            "operation=%s repository=%s reference=%s outcome=%s ms=%.1f actor=%s address=%s request=%s",
            operation,
            repo or "-",
            reference or "-",
            outcome,
            (time.perf_counter() - started) * 1000,
            request.principal_name if by is None else by.name,
            origin.address or "-",
            origin.request_id or "-",
        )


class _ObservedWriter:
    """Wraps the upload session `inner`, and writes a log line when the session is committed or cancelled.

    `write`, `read_at` and `aclose` write no log line. They are the methods of `inner` itself: a wrapper around `write`
    would cost time for every chunk of a request body."""

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
        return await log_call(self._inner.commit, digest, operation="commit_upload", repo=self._repo, reference=digest)

    async def cancel(self) -> None:
        # `log_call` passes one argument, and `cancel` takes none.
        await log_call(
            lambda _: self._inner.cancel(), None, operation="cancel_upload", repo=self._repo, reference=self.id
        )


class Observed(ForwardingRegistry):
    """Makes each call on `inner`, reports how long it took, and writes a log line for it."""

    def __init__(self, inner: Registry, on_call: OnCall | None = None, trace_call: TraceCall | None = None) -> None:
        """`on_call`: called after each call; None: the calls are neither measured nor traced, even with `trace_call`.
        `trace_call`: makes a context manager for each call; None: the calls are not traced."""
        super().__init__(inner)
        self._on_call = on_call
        self._trace_call = trace_call

    def handle(self, call: Call[T]) -> Coroutine[Any, Any, T]:
        if self._on_call is not None:
            return self._measure(call, self._on_call)
        return self._forward_and_log(call)

    async def _measure(self, call: Call[T], on_call: OnCall) -> T:
        """Makes the call on `inner`, and then calls `on_call`, even if the call raised an error. If there is a
        `trace_call`, makes the call inside its context manager."""
        started = time.perf_counter()
        try:
            if self._trace_call is None:
                return await self._forward_and_log(call)
            with self._trace_call(call.operation, call.repo):
                return await self._forward_and_log(call)
        finally:
            on_call(call.operation, time.perf_counter() - started)

    def _forward_and_log(self, call: Call[T]) -> Coroutine[Any, Any, T]:
        """Makes the call on `inner`. At the log level DEBUG, writes the log line of the call. Wraps the upload
        session if the call returns one."""
        if call.operation in _WRITER_OPERATIONS:
            return self._open_writer(call)
        if not log.isEnabledFor(logging.DEBUG):
            return self.forward(call)
        return log_call(self.forward, call, call.operation, call.repo, call.log_reference, call.actor)

    async def _open_writer(self, call: Call[T]) -> T:
        repo = call.repo
        opened: Any = await log_call(self.forward, call, call.operation, repo, call.log_reference, call.actor)
        return cast(T, _ObservedWriter(opened, repo))
