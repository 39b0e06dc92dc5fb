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
ARTIFACT_TYPES = ["sig/x", "application/vnd.oci.image.layer.v1.tar"]
"""A type that manifests state themselves, and one that their config states."""


@dataclass(frozen=True)
class Raised:
    """The error of a call, as far as the interface specifies it."""

    kind: str
    position: int | None = None


def _told(error: RegistryError) -> Raised:
    if isinstance(error, RangeInvalid):
        return Raised("RangeInvalid", error.size if error.offset is None else error.offset)
    # The interface does not say which of the two a writer raises whose session has ended.
    if isinstance(error, BlobUploadInvalid | BlobUploadUnknown):
        return Raised("the session is not this caller's")
    return Raised(type(error).__name__)


def _plain(answer: Any) -> Any:
    """Returns the part of a result that must be equal, as values that can be compared."""
    match answer:
        case Page():
            return [_plain(item) for item in answer.items], answer.more
        case Manifest():
            return answer.body, answer.media_type, answer.digest
        case Descriptor():
            return answer.as_json()
        case _:
            return answer


async def answer_of(call: Awaitable[Any]) -> Any:
    """Returns the call's result or error in a form that can be compared."""
    try:
        return _plain(await call)
    except RegistryError as error:
        return _told(error)


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
    """One session in each registry. `writers`: those that own it; None: no writer does. `old`: those that lost it."""

    repo: RepositoryName
    ids: list[Any]
    writers: list[BlobWriter] | None
    taken: bytes = b""
    old: list[list[BlobWriter]] = field(default_factory=list)


class RegistryPair:
    """The model and the registry under test, on an event loop of their own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, model: Registry, tested: Registry) -> None:
        self.loop = loop
        self.both: list[Registry] = [model, tested]

    def ask(self, call: Callable[..., Awaitable[Any]], *what: object) -> Any:
        """Makes the call on both registries. Returns their common result."""
        return self.compare([call(registry, *what) for registry in self.both])

    def compare(self, calls: list[Awaitable[Any]]) -> Any:
        expected, actual = [self.loop.run_until_complete(answer_of(call)) for call in calls]
        assert actual == expected, f"the model says {expected!r}, the registry under test {actual!r}"
        return expected

    def get(self, calls: list[Awaitable[Any]]) -> list[Any]:
        """Returns the results as they are. Either both calls raise or none does."""
        answers: list[Any] = []
        told: list[Raised | None] = []
        for call in calls:
            try:
                answers.append(self.loop.run_until_complete(call))
                told.append(None)
            except RegistryError as error:
                told.append(_told(error))
        assert told[0] == told[1], f"the model says {told[0]!r}, the registry under test {told[1]!r}"
        return answers

    def compare_all(self, repos: list[RepositoryName], digests: list[Digest], tags: list[Tag]) -> None:
        """Checks that everything that can be read is the same in both registries."""
        questions: list[tuple[Callable[..., Awaitable[Any]], tuple[object, ...]]] = [(_repositories, ())]
        for repo in repos:
            questions.append((_tags, (repo,)))
            for digest in digests:
                questions += [(read_blob, (repo, digest, None)), (_manifest, (repo, digest))]
                questions += [(_referrers, (repo, digest, kind)) for kind in (None, *ARTIFACT_TYPES)]
            questions += [(described, (repo, tag)) for tag in tags]

        async def answers(registry: Registry) -> list[Any]:
            return [await answer_of(call(registry, *what)) for call, what in questions]

        # One run of the loop for all questions: each run costs more than most answers.
        expected, actual = [self.loop.run_until_complete(answers(registry)) for registry in self.both]
        for (call, what), model, tested in zip(questions, expected, actual, strict=True):
            assert tested == model, (
                f"{call.__name__}{what}: the model says {model!r}, the registry under test {tested!r}"
            )


def _repositories(registry: Registry) -> Awaitable[Any]:
    return registry.repositories(None, EVERYTHING)


def _tags(registry: Registry, repo: RepositoryName) -> Awaitable[Any]:
    return registry.tags(repo, None, EVERYTHING)


def _manifest(registry: Registry, repo: RepositoryName, digest: Digest) -> Awaitable[Any]:
    return registry.get_manifest(repo, digest)


def _referrers(registry: Registry, repo: RepositoryName, digest: Digest, kind: str | None) -> Awaitable[Any]:
    return registry.referrers(repo, digest, kind, None, EVERYTHING)
