"""A store with the cached content of two mirrors (`Cache`), for tests of eviction and of the list of cached images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import apsw

from storage.content import Manifest, digest_of
from storage.data_dir.layout import Layout
from storage.errors import ManifestUnknown
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.evictor import Budget, CacheLimits, Evictor
from storage.usage import ScopeDefinition
from tests.fakes.registry_content import BY, CONFIG_TYPE, descriptor_of, image_of, index_of

SCOPES = [
    ScopeDefinition("cache hub", ("hub/",), upstream="hub"),
    ScopeDefinition("cache other", ("other/",), upstream="other"),
    ScopeDefinition("cache", ("hub/", "other/")),
]
APP, WEB, OTHER_APP = RepositoryName("hub/app"), RepositoryName("hub/web"), RepositoryName("other/app")
LAYER_BYTES = 1000
"""The size of each layer in the cache. Each config has 2 bytes."""


class StillClock:
    """A clock that stands still until a test moves it."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Cache:
    """A store with the cached content of two mirrors. `downloads`: the blobs that are being downloaded. `free`: the
    free bytes of the disk; None: unknown."""

    def __init__(self, store: StoredRegistry, db: apsw.Connection, clock: StillClock) -> None:
        self.store = store
        self.db = db
        self.clock = clock
        self.monotonic = StillClock()
        self.downloads: set[Digest] = set()
        self.free: int | None = None

    def evictor(self, max_bytes: int | None = None, **limits: object) -> Evictor:
        """Returns an evictor with these limits. `max_bytes`: the budget of both mirrors together; None: no budget."""
        budgets = () if max_bytes is None else (Budget("cache", ("hub", "other"), max_bytes),)
        all_limits = CacheLimits(("hub", "other"), budgets, **limits)  # type: ignore[arg-type]
        store = self.store

        async def list_downloads() -> set[Digest]:
            return self.downloads

        return Evictor(
            store.cached_images,
            store.usage,
            store.collector,
            store.leases,
            all_limits,
            list_downloads=list_downloads,
            free_bytes=lambda: self.free,
            clock=self.clock,
            monotonic=self.monotonic,
        )

    async def fetch(self, repo: RepositoryName, *layers: str, tag: str = "", complete: bool = True) -> Manifest:
        """Stores an image as a mirror does, one second after the previous change. `layers`: the texts in its layers.
        `complete`: whether its blobs are stored as well."""
        self.clock.now += 1
        contents = [layer.encode().ljust(LAYER_BYTES, b".") for layer in layers]
        image = image_of(descriptor_of(b"{}", CONFIG_TYPE), [descriptor_of(data) for data in contents])
        # `sparse=True`: the store accepts the manifest although it does not have the blobs.
        await self.store.put_manifest(repo, image, [Tag(tag)] if tag else [], by=BY, sparse=True)
        for data in [b"{}", *contents] if complete else []:
            await self.add_blob(repo, data)
        return image

    async def add_blob(self, repo: RepositoryName, data: bytes) -> None:
        digest = digest_of(data)
        place = Layout.blob_place(digest)
        path = Path(self.db.filename).parent / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        await self.store.metadata.add_blob_without_upload(repo, digest, len(data), place)

    async def add_index(self, repo: RepositoryName, children: Sequence[Manifest], tag: str) -> Manifest:
        """Stores an index that lists the children, as a mirror does: the store may lack some of them."""
        index = index_of([child.descriptor for child in children])
        await self.store.put_manifest(repo, index, [Tag(tag)], by=BY, sparse=True)
        return index

    def pull(self, *manifests: Manifest) -> None:
        """Records a pull of each manifest. Each pull is one second after the previous change."""
        for manifest in manifests:
            self.clock.now += 1
            self.db.execute(
                "INSERT INTO manifest_pull (manifest, upstream, last, pulls) "
                "SELECT id, 'hub', ?, 1 FROM manifest WHERE digest = ? "
                "ON CONFLICT (manifest) DO UPDATE SET last = excluded.last, pulls = pulls + 1",
                (self.clock.now, manifest.digest),
            )

    async def has(self, repo: RepositoryName, manifest: Manifest | str) -> bool:
        """Returns whether the store has a manifest. `manifest`: the manifest itself, or its tag."""
        reference: Reference = Tag(manifest) if isinstance(manifest, str) else manifest.digest
        try:
            await self.store.resolve_manifest(repo, reference)
        except ManifestUnknown:
            return False
        return True

    async def stored_bytes(self) -> int:
        """Returns the total size of all blob files. Checks that the trash is empty."""
        root = Path(self.db.filename).parent
        assert list((root / "trash").iterdir()) == []
        return sum(file.stat().st_size for file in (root / "blobs").rglob("*") if file.is_file())

    async def counted_bytes(self) -> int:
        """Returns the bytes that the store counts for both mirrors. Checks that they equal a recount."""
        use = await self.store.usage.scope("cache")
        assert use == await self.store.usage.recount("cache")
        assert use is not None
        return use.bytes
