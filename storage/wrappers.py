"""Wrappers: registries in front of another registry, which receive every call as one `Call` object.

The signatures of the interface stand here once. A wrapper overrides `handle`: it decides about the call, changes it
where needed, and makes it with `await call.on(inner)`. `RefusingRegistry` refuses, so a wrapper that starts there
refuses every call that it does not handle; `ForwardingRegistry` makes every call on the registry behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Generic, Protocol, TypeGuard, TypeVar

from storage.access import Action
from storage.content import Actor, Condition, Descriptor, Manifest, Page, Span
from storage.errors import Unsupported
from storage.interface import BlobReader, BlobWriter, Deleter, Lister, Reader, Registry, Writer
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.patterns import ALL_NAMES, NameSet

T = TypeVar("T")
NO_REPOSITORY: Final = str.__new__(RepositoryName)
"""The repository of a call that names none: the list of repositories."""
_NO_OPTIONS: Final[dict[str, Any]] = {}
_OPERATIONS: Final = frozenset(
    name for part in (Reader, Writer, Deleter, Lister) for name in vars(part) if not name.startswith("_")
)
_NAMELESS: Final = frozenset({"repositories", "tags"})


class Call(Generic[T]):
    """One call on a registry that has not been made yet; `T` is what it returns.

    `operation` is the method's name. `action` is what it does to `repo`: PULL for the calls of Reader and Lister, PUSH
    for those of Writer, DELETE for those of Deleter. `args` are the positional arguments after the repository,
    `options` the keyword arguments."""

    __slots__ = ("action", "args", "operation", "options", "repo")

    def __init__(
        self,
        operation: str,
        action: Action,
        repo: RepositoryName,
        args: tuple[Any, ...] = (),
        options: dict[str, Any] = _NO_OPTIONS,
    ) -> None:
        self.operation = operation
        self.action = action
        self.repo = repo
        self.args = args
        self.options = options

    def on(self, registry: Registry) -> Coroutine[Any, Any, T]:
        """Returns the call on `registry`, to be awaited. May be made more than once."""
        method: Callable[..., Coroutine[Any, Any, T]] = getattr(registry, self.operation)
        if self.repo:
            return method(self.repo, *self.args, **self.options)
        return method(*self.args, **self.options)

    @property
    def by(self) -> Actor | None:
        """Who makes the call, where it says so."""
        return self.options.get("by")

    @property
    def reference(self) -> str:
        """What the call is about, for logs: a digest, tag, upload or algorithm; a manifest's digest with its tags."""
        if self.operation == "put_manifest":
            return ",".join((self.args[0].digest, *self.args[1]))
        return "" if self.operation in _NAMELESS else self.args[0]


class Forward(Protocol):
    """Makes a call on another registry."""

    def __call__(self, call: Call[T], /) -> Coroutine[Any, Any, T]: ...


class RefusingRegistry(Registry):
    """Raises Unsupported for every call, unless a subclass overrides `handle` or the method."""

    async def handle(self, call: Call[T]) -> T:
        """Answers a call. Raises Unsupported here."""
        raise Unsupported

    def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Coroutine[Any, Any, Descriptor]:
        return self.handle(Call("resolve_blob", Action.PULL, repo, (digest,)))

    def open_blob(
        self, repo: RepositoryName, digest: Digest, span: Span | None = None
    ) -> Coroutine[Any, Any, BlobReader]:
        return self.handle(Call("open_blob", Action.PULL, repo, (digest, span)))

    def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Coroutine[Any, Any, Descriptor]:
        return self.handle(Call("resolve_manifest", Action.PULL, repo, (reference,)))

    def get_manifest(self, repo: RepositoryName, reference: Reference) -> Coroutine[Any, Any, Manifest]:
        return self.handle(Call("get_manifest", Action.PULL, repo, (reference,)))

    def start_upload(
        self, repo: RepositoryName, algorithm: str = "sha256", *, by: Actor | None = None
    ) -> Coroutine[Any, Any, BlobWriter]:
        return self.handle(Call("start_upload", Action.PUSH, repo, (algorithm,), {"by": by}))

    def resume_upload(
        self, repo: RepositoryName, upload: UploadID, offset: int | None = None, *, by: Actor | None = None
    ) -> Coroutine[Any, Any, BlobWriter]:
        return self.handle(Call("resume_upload", Action.PUSH, repo, (upload, offset), {"by": by}))

    def upload_offset(
        self, repo: RepositoryName, upload: UploadID, *, by: Actor | None = None
    ) -> Coroutine[Any, Any, int]:
        return self.handle(Call("upload_offset", Action.PUSH, repo, (upload,), {"by": by}))

    def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> Coroutine[Any, Any, Descriptor]:
        return self.handle(Call("mount_blob", Action.PUSH, repo, (digest, source), {"by": by}))

    def put_manifest(
        self,
        repo: RepositoryName,
        manifest: Manifest,
        tags: Sequence[Tag] = (),
        *,
        by: Actor,
        sparse: bool = False,
        condition: Condition | None = None,
    ) -> Coroutine[Any, Any, Descriptor]:
        options = {"by": by, "sparse": sparse, "condition": condition}
        return self.handle(Call("put_manifest", Action.PUSH, repo, (manifest, tags), options))

    def delete_blob(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, even_if_referenced: bool = False
    ) -> Coroutine[Any, Any, None]:
        options = {"by": by, "even_if_referenced": even_if_referenced}
        return self.handle(Call("delete_blob", Action.DELETE, repo, (digest,), options))

    def delete_manifest(self, repo: RepositoryName, digest: Digest, *, by: Actor) -> Coroutine[Any, Any, None]:
        return self.handle(Call("delete_manifest", Action.DELETE, repo, (digest,), {"by": by}))

    def delete_tag(self, repo: RepositoryName, tag: Tag, *, by: Actor) -> Coroutine[Any, Any, None]:
        return self.handle(Call("delete_tag", Action.DELETE, repo, (tag,), {"by": by}))

    def repositories(
        self, after: str | None, limit: int, within: NameSet = ALL_NAMES
    ) -> Coroutine[Any, Any, Page[RepositoryName]]:
        return self.handle(Call("repositories", Action.PULL, NO_REPOSITORY, (after, limit, within)))

    def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Coroutine[Any, Any, Page[Tag]]:
        return self.handle(Call("tags", Action.PULL, repo, (after, limit)))

    def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Coroutine[Any, Any, Page[Descriptor]]:
        return self.handle(Call("referrers", Action.PULL, repo, (subject, artifact_type, after, limit)))


class ForwardingRegistry(RefusingRegistry):
    """Makes every call on `inner`. A subclass overrides `handle` to do something before or after, and passes the call
    on with `await self.forward(call)`. The registry behind may change the call, so it is not read after that."""

    def __init__(self, inner: Registry) -> None:
        self.inner = inner
        self.forward: Forward = inner.handle if _only_handles(inner) else _maker_on(inner)

    async def handle(self, call: Call[T]) -> T:
        return await self.forward(call)


def _only_handles(registry: Registry) -> TypeGuard[RefusingRegistry]:
    """Returns whether a registry answers every call by its `handle`. It then takes the call itself, without a second
    one: that would cost every request half a microsecond."""
    kind = type(registry)
    return isinstance(registry, RefusingRegistry) and all(
        getattr(kind, name) is made for name, made in vars(RefusingRegistry).items() if name in _OPERATIONS
    )


def _maker_on(registry: Registry) -> Forward:
    def make(call: Call[T]) -> Coroutine[Any, Any, T]:
        return call.on(registry)

    return make
