"""`Observed`: one log line for each call on a registry, whoever makes it.

The line is `key=value` pairs: what was done, to what, how it came out, how long it took, and for whom. Why something
failed is logged where the failure is answered.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeVar

from registry.http.exchange import ACTING
from storage.content import Actor, Condition, Descriptor, Manifest, Page, Span
from storage.errors import RegistryError
from storage.interface import BlobReader, BlobWriter, Registry
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.patterns import ALL_NAMES, NameSet
from storage.wrappers import RefusingRegistry

log = logging.getLogger("registry.calls")

T = TypeVar("T")
_NOBODY = Actor()
Clock = Callable[[], float]


async def log_call(
    call: Awaitable[T], operation: str, repo: str, what: str, by: Actor | None = None, clock: Clock = time.perf_counter
) -> T:
    """Awaits `call` and writes its line. Raises what it raises."""
    if not log.isEnabledFor(logging.INFO):
        return await call
    outcome, begun = "OK", clock()
    exchange = ACTING.get()
    try:
        result = await call
        if exchange is not None and exchange.calls is not None:
            exchange.calls.append(partial(_write_cached_line, operation, repo, what))
        return result
    except RegistryError as error:
        outcome = error.code
        raise
    except BaseException as error:
        outcome = type(error).__name__
        raise
    finally:
        who = by or exchange or _NOBODY
        _write_line(operation, repo, what, outcome, (clock() - begun) * 1000, who.name, who.address, who.request_id)


def _write_line(
    operation: str, repo: str, what: str, outcome: str, ms: float, name: str, address: str, request: str
) -> None:
    log.info(
        "operation=%s repository=%s reference=%s outcome=%s ms=%.1f actor=%s address=%s request=%s",
        operation,
        repo or "-",
        what or "-",
        outcome,
        ms,
        name,
        address or "-",
        request or "-",
    )


def _write_cached_line(operation: str, repo: str, what: str, name: str, address: str, request: str) -> None:
    """The line of a call that was not made, since its answer was ready."""
    _write_line(operation, repo, what, "OK", 0.0, name, address, request)


class _LoggedWriter:
    """An upload session; its end is worth a line. `write` is the session's own: it is called for every chunk."""

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
        return await log_call(self._inner.commit(digest), "commit_upload", self._repo, digest)

    async def cancel(self) -> None:
        await log_call(self._inner.cancel(), "cancel_upload", self._repo, self.id)


class Observed(RefusingRegistry):
    """`inner`, with a line for each call."""

    def __init__(self, inner: Registry) -> None:
        self.inner = inner

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        return await log_call(self.inner.resolve_blob(repo, digest), "resolve_blob", repo, digest)

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        return await log_call(self.inner.open_blob(repo, digest, span), "open_blob", repo, digest)

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        return await log_call(self.inner.resolve_manifest(repo, reference), "resolve_manifest", repo, reference)

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        return await log_call(self.inner.get_manifest(repo, reference), "get_manifest", repo, reference)

    async def start_upload(
        self, repo: RepositoryName, algorithm: str = "sha256", *, by: Actor | None = None
    ) -> BlobWriter:
        writer = await log_call(self.inner.start_upload(repo, algorithm, by=by), "start_upload", repo, algorithm, by)
        return _LoggedWriter(writer, repo)

    async def resume_upload(
        self, repo: RepositoryName, upload: UploadID, offset: int | None = None, *, by: Actor | None = None
    ) -> BlobWriter:
        call = self.inner.resume_upload(repo, upload, offset, by=by)
        writer = await log_call(call, "resume_upload", repo, upload, by)
        return _LoggedWriter(writer, repo)

    async def upload_offset(self, repo: RepositoryName, upload: UploadID, *, by: Actor | None = None) -> int:
        return await log_call(self.inner.upload_offset(repo, upload, by=by), "upload_offset", repo, upload, by)

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> Descriptor:
        return await log_call(self.inner.mount_blob(repo, digest, source, by), "mount_blob", repo, digest, by)

    async def put_manifest(
        self,
        repo: RepositoryName,
        manifest: Manifest,
        tags: Sequence[Tag] = (),
        *,
        by: Actor,
        sparse: bool = False,
        condition: Condition | None = None,
    ) -> Descriptor:
        call = self.inner.put_manifest(repo, manifest, tags, by=by, sparse=sparse, condition=condition)
        return await log_call(call, "put_manifest", repo, ",".join((manifest.digest, *tags)), by)

    async def delete_blob(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, even_if_referenced: bool = False
    ) -> None:
        await log_call(
            self.inner.delete_blob(repo, digest, by=by, even_if_referenced=even_if_referenced),
            "delete_blob",
            repo,
            digest,
            by,
        )

    async def delete_manifest(self, repo: RepositoryName, digest: Digest, *, by: Actor) -> None:
        await log_call(self.inner.delete_manifest(repo, digest, by=by), "delete_manifest", repo, digest, by)

    async def delete_tag(self, repo: RepositoryName, tag: Tag, *, by: Actor) -> None:
        await log_call(self.inner.delete_tag(repo, tag, by=by), "delete_tag", repo, tag, by)

    async def repositories(self, after: str | None, limit: int, within: NameSet = ALL_NAMES) -> Page[RepositoryName]:
        return await log_call(self.inner.repositories(after, limit, within), "repositories", "", "")

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        return await log_call(self.inner.tags(repo, after, limit), "tags", repo, "")

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        call = self.inner.referrers(repo, subject, artifact_type, after, limit)
        return await log_call(call, "referrers", repo, subject)
