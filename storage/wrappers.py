"""Base classes of wrappers: registries that check or change calls and pass them on to another registry.

Both base classes turn each call of a method of `Registry` into one `Call` object and pass it to their method `handle`.
A wrapper overrides only `handle`. The overriding method inspects the call, may change the call, and makes the call on
the other registry with `await call.invoke_on(registry)`. The base classes differ in their own `handle`:
`RefusingRegistry.handle` refuses every call, `ForwardingRegistry.handle` passes every call on.
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
"""An empty name: the value of `Call.repo` for `repositories`, the one method that takes no repository."""
_NO_OPTIONS: Final[dict[str, Any]] = {}
"""The `Call.options` of calls without keyword arguments. Never changed."""
_OPERATIONS: Final = frozenset(
    name for base in (Reader, Writer, Deleter, Lister) for name in vars(base) if not name.startswith("_")
)
"""Names of all methods of `Registry`."""
_OPERATIONS_WITHOUT_REFERENCE: Final = frozenset({"repositories", "tags"})
"""Names of the methods whose calls have an empty `Call.log_reference`."""


class Call(Generic[T]):
    """The method and the arguments of a call on a registry, before the call is made. `T` is the type of the result.

    `operation`: name of the method of `Registry`. `action`: the right on `repo` that the call needs (PULL for methods
    of Reader and Lister, PUSH for methods of Writer, DELETE for methods of Deleter). `repo`: the repository, or
    `NO_REPOSITORY`. `args`: the positional arguments after the repository. `options`: the keyword arguments."""

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

    def invoke_on(self, registry: Registry) -> Coroutine[Any, Any, T]:
        """Calls the method on `registry` and returns the coroutine of the call. The caller awaits the coroutine.
        `invoke_on` may be called more than once, and with different registries."""
        method: Callable[..., Coroutine[Any, Any, T]] = getattr(registry, self.operation)
        if self.repo:
            return method(self.repo, *self.args, **self.options)
        return method(*self.args, **self.options)

    @property
    def actor(self) -> Actor | None:
        """The client on whose behalf the call is made: the option `by`. None if the call has no such option."""
        return self.options.get("by")

    @property
    def log_reference(self) -> str:
        """What the call acts on, as a text for logs: the manifest's digest and tags for `put_manifest`, the digest
        algorithm for `start_upload`, an empty text for `repositories` and `tags`, and a digest, tag or upload id for
        all other methods."""
        if self.operation == "put_manifest":
            return ",".join((self.args[0].digest, *self.args[1]))
        return "" if self.operation in _OPERATIONS_WITHOUT_REFERENCE else self.args[0]


class Forward(Protocol):
    """A function that makes a call on another registry. It returns a coroutine that returns the result of the call."""

    def __call__(self, call: Call[T], /) -> Coroutine[Any, Any, T]: ...


class RefusingRegistry(Registry):
    """A registry that raises Unsupported for every call. All methods pass their calls to `handle`. A subclass overrides
    `handle` or single methods."""

    async def handle(self, call: Call[T]) -> T:
        """A subclass makes the call here and returns its result. This implementation raises Unsupported."""
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

    def delete_manifest(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, restorable: bool = True
    ) -> Coroutine[Any, Any, None]:
        options = {"by": by, "restorable": restorable}
        return self.handle(Call("delete_manifest", Action.DELETE, repo, (digest,), options))

    def delete_tag(
        self, repo: RepositoryName, tag: Tag, *, by: Actor, condition: Condition | None = None
    ) -> Coroutine[Any, Any, None]:
        return self.handle(Call("delete_tag", Action.DELETE, repo, (tag,), {"by": by, "condition": condition}))

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
    """A registry that passes every call on to the registry `inner`. A subclass overrides `handle` to do something
    before or after a call. The overriding method makes the call with `await self.forward(call)`. Afterwards it must
    not read the `Call` object, because `inner` may have changed the object."""

    def __init__(self, inner: Registry) -> None:
        self.inner = inner
        self.forward: Forward = inner.handle if _passes_all_calls_to_handle(inner) else _forward_to(inner)

    async def handle(self, call: Call[T]) -> T:
        return await self.forward(call)


def _passes_all_calls_to_handle(registry: Registry) -> TypeGuard[RefusingRegistry]:
    """Returns whether `registry` is a wrapper whose methods all pass their calls to its `handle`. Such a wrapper can
    take a `Call` object directly, which is faster than a call of the method."""
    registry_class = type(registry)
    return isinstance(registry, RefusingRegistry) and all(
        getattr(registry_class, name) is method
        for name, method in vars(RefusingRegistry).items()
        if name in _OPERATIONS
    )


def _forward_to(registry: Registry) -> Forward:
    """Returns a function that makes calls on `registry` through its methods."""

    def forward(call: Call[T]) -> Coroutine[Any, Any, T]:
        return call.invoke_on(registry)

    return forward
