"""Makes the same calls on two registries, and checks that the results are equal."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from storage.content import Descriptor, Manifest, Page, Span
from storage.errors import BlobUploadInvalid, BlobUploadUnknown, RangeInvalid, RegistryError
from storage.interface import BlobWriter, Registry
from storage.names import Digest, Reference, RepositoryName, Tag

EVERYTHING = 10_000
"""A page size that is larger than any list."""
ARTIFACT_TYPES = ["sig/x", "application/vnd.oci.image.layer.v1.tar"]
"""Artifact types of the test's manifests. Some manifests state the first type; for others, the media type of their
config (the second one) counts."""


@dataclass(frozen=True)
class Raised:
    """The error of a call, reduced to the facts that the interface specifies."""

    kind: str
    position: int | None = None


def _comparable_error(error: RegistryError) -> Raised:
    """Returns the part of an error that must be equal in both registries."""
    if isinstance(error, RangeInvalid):
        return Raised("RangeInvalid", error.size if error.offset is None else error.offset)
    # When a session has ended, a writer may raise either error: the interface does not specify which.
    if isinstance(error, BlobUploadInvalid | BlobUploadUnknown):
        return Raised("the session is not this caller's")
    return Raised(type(error).__name__)


def _comparable(answer: Any) -> Any:
    """Returns the part of a result that must be equal on both registries, as values that can be compared."""
    match answer:
        case Page():
            return [_comparable(item) for item in answer.items], answer.more
        case Manifest():
            return answer.body, answer.media_type, answer.digest
        case Descriptor():
            return answer.as_json()
        case _:
            return answer


async def answer_of(call: Awaitable[Any]) -> Any:
    """Awaits a call. Returns its result or its error in a form that can be compared."""
    try:
        return _comparable(await call)
    except RegistryError as error:
        return _comparable_error(error)


async def read_blob(registry: Registry, repo: RepositoryName, digest: Digest, span: Span | None) -> bytes:
    reader = await registry.open_blob(repo, digest, span)
    try:
        return b"".join([chunk async for chunk in reader])
    finally:
        await reader.aclose()


async def described(registry: Registry, repo: RepositoryName, reference: Reference) -> tuple[str, str, int]:
    resolved = await registry.resolve_manifest(repo, reference)
    return resolved.media_type, resolved.digest, resolved.size


@dataclass
class UploadPair:
    """An upload session on each of the two registries. `writers`: the writer that owns the session, for each registry;
    None: no writer owns it. `accepted`: the bytes that were written so far. `lost_writers`: pairs of writers that owned
    the session before."""

    repo: RepositoryName
    ids: list[Any]
    writers: list[BlobWriter] | None
    accepted: bytes = b""
    lost_writers: list[list[BlobWriter]] = field(default_factory=list)


class RegistryPair:
    """The reference model and the registry under test. Calls run on the event loop `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, model: Registry, tested: Registry) -> None:
        self.loop = loop
        self.both: list[Registry] = [model, tested]

    def ask(self, call: Callable[..., Awaitable[Any]], *arguments: object) -> Any:
        """Makes the call on both registries. Returns their common result."""
        return self.compare([call(registry, *arguments) for registry in self.both])

    def compare(self, calls: list[Awaitable[Any]]) -> Any:
        expected, actual = [self.loop.run_until_complete(answer_of(call)) for call in calls]
        assert actual == expected, f"the model says {expected!r}, the registry under test {actual!r}"
        return expected

    def get(self, calls: list[Awaitable[Any]]) -> list[Any]:
        """Makes one call on each registry and returns the two results; an empty list if the calls raise. Checks that
        both calls raise the same error, or none."""
        answers: list[Any] = []
        errors: list[Raised | None] = []
        for call in calls:
            try:
                answers.append(self.loop.run_until_complete(call))
                errors.append(None)
            except RegistryError as error:
                errors.append(_comparable_error(error))
        assert errors[0] == errors[1], f"the model says {errors[0]!r}, the registry under test {errors[1]!r}"
        return answers

    def compare_all(self, repos: list[RepositoryName], digests: list[Digest], tags: list[Tag]) -> None:
        """Checks that both registries return the same for all blobs, manifests, tags and lists."""
        calls: list[tuple[Callable[..., Awaitable[Any]], tuple[object, ...]]] = [(_repositories, ())]
        for repo in repos:
            calls.append((_tags, (repo,)))
            for digest in digests:
                calls += [(read_blob, (repo, digest, None)), (_manifest, (repo, digest))]
                calls += [(_referrers, (repo, digest, kind)) for kind in (None, *ARTIFACT_TYPES)]
            calls += [(described, (repo, tag)) for tag in tags]

        async def results(registry: Registry) -> list[Any]:
            return [await answer_of(call(registry, *arguments)) for call, arguments in calls]

        # All calls run in one run of the event loop, because the start of a run costs more than most calls.
        expected, actual = [self.loop.run_until_complete(results(registry)) for registry in self.both]
        for (call, arguments), model, tested in zip(calls, expected, actual, strict=True):
            assert tested == model, (
                f"{call.__name__}{arguments}: the model says {model!r}, the registry under test {tested!r}"
            )


def _repositories(registry: Registry) -> Awaitable[Any]:
    return registry.repositories(None, EVERYTHING)


def _tags(registry: Registry, repo: RepositoryName) -> Awaitable[Any]:
    return registry.tags(repo, None, EVERYTHING)


def _manifest(registry: Registry, repo: RepositoryName, digest: Digest) -> Awaitable[Any]:
    return registry.get_manifest(repo, digest)


def _referrers(registry: Registry, repo: RepositoryName, digest: Digest, kind: str | None) -> Awaitable[Any]:
    return registry.referrers(repo, digest, kind, None, EVERYTHING)
