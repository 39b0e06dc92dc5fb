"""Fixtures of the contract tests: the implementations of the registry interface ("kinds"). Each test runs once on each
kind. Also has checks that several test modules use."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from registry.auth.rights.guard import Guarded
from registry.auth.rights.principal import Identity, Principal, Rights
from registry.naming import NamingRules
from registry.observe import Observed
from registry.restrict import Restricted
from registry.router import Router
from storage.composition import open_registry, prepare_data_dir
from storage.content import Manifest
from storage.errors import ManifestUnknown, NameUnknown
from storage.interface import Registry
from storage.memory_registry import MemoryRegistry
from storage.names import Digest, RepositoryName, Tag
from tests.fakes.object_store.multipart_blob_store import open_objects
from tests.fakes.small_store import small_store as small_store
from tests.fakes.store_accounts import acting_as

PART_BYTES = 64 * 1024
"""Smallest size of a part of a multipart upload to the object store."""
LATEST = Tag("latest")


class InTurns:
    """Several registries on one data directory. Each call goes to the next registry in turn, as the requests of clients
    go to several worker processes."""

    def __init__(self, *registries: Registry) -> None:
        self._next = itertools.cycle(registries)

    def __getattr__(self, name: str) -> Any:
        return getattr(next(self._next), name)


@asynccontextmanager
async def _memory(_: Path) -> AsyncIterator[Registry]:
    yield MemoryRegistry()


@asynccontextmanager
async def _observed(_: Path) -> AsyncIterator[Registry]:
    yield Observed(MemoryRegistry())


@asynccontextmanager
async def _restricted(_: Path) -> AsyncIterator[Registry]:
    yield Restricted(MemoryRegistry())


def _router(hosted: MemoryRegistry, default: str | None = None) -> Router:
    async def is_hosted(repo: RepositoryName) -> bool:
        try:
            await hosted.tags(repo, None, 1)
        except NameUnknown:
            return False
        return True

    return Router(hosted, {"docker.io": MemoryRegistry()}, is_hosted, NamingRules(["docker.io"], default=default))


@asynccontextmanager
async def _routed(_: Path) -> AsyncIterator[Registry]:
    """Yields a router without a default upstream. It sends calls to the hosted registry, unless the repository name
    begins with the name of an upstream."""
    yield _router(MemoryRegistry())


@asynccontextmanager
async def _routed_with_default(_: Path) -> AsyncIterator[Registry]:
    """Yields a router with a default upstream that has no content. The router sends calls for a repository to this
    upstream until a client pushes to the repository."""
    yield _router(MemoryRegistry(), default="docker.io")


class AsAdmin:
    """A registry that checks access rights (`Guarded`). Every call is made by an account with all rights."""

    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **more: Any) -> Any:
            with acting_as(Principal(Identity("tester"), Rights.everything(admin=True))):
                return await getattr(self._guarded, name)(*args, **more)

        return call


@asynccontextmanager
async def _guarded(_: Path) -> AsyncIterator[Any]:
    router = _router(MemoryRegistry(), default="docker.io")
    yield AsAdmin(Guarded(router, router.naming, router.stored_name))


@asynccontextmanager
async def _stored(data: Path) -> AsyncIterator[Registry]:
    prepare_data_dir(data)
    async with open_registry(data) as registry:
        yield registry


@asynccontextmanager
async def _stored_twice(data: Path) -> AsyncIterator[Any]:
    prepare_data_dir(data)
    async with open_registry(data) as first, open_registry(data) as second:
        yield InTurns(first, second)


@asynccontextmanager
async def _in_objects(data: Path) -> AsyncIterator[Registry]:
    """Yields a registry that keeps blobs in an object store. The parts of its multipart uploads are small, so that the
    blobs of the tests have several parts."""
    prepare_data_dir(data)
    async with open_registry(data, open_content=open_objects(data / "bucket", PART_BYTES)) as registry:
        yield registry


@asynccontextmanager
async def _in_objects_twice(data: Path) -> AsyncIterator[Any]:
    prepare_data_dir(data)
    content = open_objects(data / "bucket", PART_BYTES)
    async with open_registry(data, open_content=content) as first, open_registry(data, open_content=content) as second:
        yield InTurns(first, second)


KINDS: dict[str, Callable[[Path], AbstractAsyncContextManager[Registry]]] = {
    "guarded": _guarded,
    "memory": _memory,
    "observed": _observed,
    "restricted": _restricted,
    "routed": _routed,
    "routed, with a default upstream": _routed_with_default,
    "stored": _stored,
    "stored, opened twice": _stored_twice,
    "stored in objects": _in_objects,
    "stored in objects, opened twice": _in_objects_twice,
}


DAILY = ("memory", "stored")
"""The kinds on which `make check` runs the tests. The other kinds pass their calls on to one of these."""


@pytest.fixture(
    params=[kind if kind in DAILY else pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(KINDS)]
)
async def registry(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Registry]:
    async with KINDS[request.param](tmp_path / "data") as opened:
        yield opened


@pytest.fixture
def repo() -> RepositoryName:
    return RepositoryName("team/app")


@pytest.fixture
def other() -> RepositoryName:
    return RepositoryName("team/app/deeper/other")


async def assert_is(registry: Registry, repo: RepositoryName, reference: Tag | Digest, manifest: Manifest) -> None:
    """Checks that the reference resolves to the manifest."""
    pulled = await registry.get_manifest(repo, reference)
    assert (pulled.body, pulled.media_type, pulled.digest) == (manifest.body, manifest.media_type, manifest.digest)
    resolved = await registry.resolve_manifest(repo, reference)
    assert (resolved.digest, resolved.media_type, resolved.size) == (
        manifest.digest,
        manifest.media_type,
        len(manifest.body),
    )


async def assert_unknown(registry: Registry, repo: RepositoryName, reference: Tag | Digest) -> None:
    """Checks that the reference resolves to no manifest."""
    with pytest.raises(ManifestUnknown):
        await registry.get_manifest(repo, reference)
    with pytest.raises(ManifestUnknown):
        await registry.resolve_manifest(repo, reference)
