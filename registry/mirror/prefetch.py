"""Prefetching: starts fills for blobs that the client of a running pull will ask for next.

A client that gets an image's manifest needs its config next (some hundred bytes). A client that asks for a layer pulls
the image, so its other layers are fetched, too. A HEAD or the manifest of an index starts nothing.

`PrefetchQueue` holds names only: a queued blob has no open file, and nothing looks at it until a connection is free
that no client waits for.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import islice
from typing import Final, Literal

from registry.mirror.fill.fill import Fill
from registry.mirror.fill.slots import ImagePull
from registry.single_flight import cancel_and_wait, start_detached
from storage.content import MANIFESTS, Descriptor, Manifest
from storage.errors import RegistryError
from storage.names import Digest, RepositoryName

MAX_IMAGES: Final = 256
"""Pulls that are tracked at a time."""
MAX_IMAGE_BLOBS: Final = 256
"""Blobs of one image that are prefetched. docker supports at most 127 layers."""
MAX_MANIFEST_SIZE: Final = 256 * 1024
"""Largest manifest, in bytes, that is parsed (on the event loop) for prefetching."""
PrefetchMode = Literal["off", "config", "layers"]


class _PulledImage:
    """An image of which a client pulled the manifest or a layer."""

    def __init__(self, manifest: Manifest, clock: Callable[[], float]) -> None:
        self.pull = ImagePull(clock)
        self.config = _without_annotations(manifest.config) if manifest.config else None
        foreign = manifest.foreign
        self.blobs = [
            _without_annotations(blob)
            for blob in islice((b for b in manifest.blobs if b.digest not in foreign), MAX_IMAGE_BLOBS)
        ]
        self.digests = frozenset(blob.digest for blob in self.blobs)
        self.config_begun = self.layers_begun = False

    def has_layer(self, digest: Digest) -> bool:
        return digest in self.digests and (self.config is None or digest != self.config.digest)


def _without_annotations(blob: Descriptor) -> Descriptor:
    """Returns the fields that a fill needs. Annotations can be as large as the manifest, and images are tracked for
    long."""
    return Descriptor(blob.media_type, blob.digest, blob.size)


class Prefetcher:
    """Decides what to prefetch. `may_prefetch` tells whether the upstream's limit leaves requests for it. `clock`:
    monotonic, in seconds."""

    def __init__(
        self, mode: PrefetchMode, queue: PrefetchQueue, may_prefetch: Callable[[], bool], clock: Callable[[], float]
    ) -> None:
        self._mode = mode
        self._queue = queue
        self._may_prefetch = may_prefetch
        self._clock = clock
        self._images: OrderedDict[tuple[RepositoryName, Digest], _PulledImage] = OrderedDict()
        self._without_layers: dict[RepositoryName, dict[Digest, _PulledImage]] = {}
        """The images in `_images` whose layers were not started. A cache hit looks here only, so it costs nothing once
        all layers are started."""

    def on_manifest(self, repo: RepositoryName, manifest: Manifest) -> None:
        """Called when a client got the manifest: starts the config's fill."""
        if self._mode == "off" or manifest.media_type not in MANIFESTS:
            return
        if len(manifest.body) > MAX_MANIFEST_SIZE or not manifest.is_readable:
            return
        image = self._image(repo, manifest)
        if image.config is not None and not image.config_begun and self._may_prefetch():
            image.config_begun = True
            self._queue.add(repo, [image.config], image.pull, first=True)

    def on_blob(self, repo: RepositoryName, digest: Digest, manifests: Sequence[Manifest]) -> None:
        """Called when a client asked for a blob that is not stored. `manifests` name the blob, newest first. Starts the
        other layers of the images whose manifest was pulled a short time ago, or else of the newest image only, since
        many images share a base layer."""
        if self._mode != "layers" or not self._may_prefetch():
            return
        recent = [manifest for manifest in manifests if (repo, manifest.digest) in self._images]
        for manifest in recent or manifests[:1]:
            self._begin_layers(repo, manifest.digest, self._image(repo, manifest), digest)

    def on_hit(self, repo: RepositoryName, digest: Digest) -> None:
        """Called when a client asked for a blob that is stored: starts the other layers of images whose manifest was
        pulled a short time ago."""
        if self._mode != "layers" or repo not in self._without_layers or not self._may_prefetch():
            return
        for name, image in list(self._without_layers[repo].items()):
            if image.pull.is_active():
                self._begin_layers(repo, name, image, digest)

    def pulls_of(self, digest: Digest) -> list[ImagePull]:
        """Returns the running pulls of images that contain the blob."""
        return [image.pull for image in self._images.values() if digest in image.digests]

    @property
    def busy(self) -> bool:
        """Whether fills are about to be started."""
        return self._queue.busy

    async def aclose(self) -> None:
        """Starts no more fills. Running fills go on."""
        await self._queue.aclose()

    def _begin_layers(self, repo: RepositoryName, name: Digest, image: _PulledImage, asked: Digest) -> None:
        if image.layers_begun or not image.has_layer(asked):
            return
        image.layers_begun = True
        self._forget_without_layers(repo, name)
        self._queue.add(repo, (blob for blob in image.blobs if blob.digest != asked), image.pull)

    def _image(self, repo: RepositoryName, manifest: Manifest) -> _PulledImage:
        key = (repo, manifest.digest)
        image = self._images.get(key)
        if image is None or not image.pull.is_active():  # the blobs of an older pull may have been deleted since
            image = self._images[key] = _PulledImage(manifest, self._clock)
            if self._mode == "layers":
                self._without_layers.setdefault(repo, {})[manifest.digest] = image
        self._images.move_to_end(key)
        image.pull.touch()
        while len(self._images) > MAX_IMAGES:
            old, _ = self._images.popitem(last=False)
            self._forget_without_layers(*old)
        return image

    def _forget_without_layers(self, repo: RepositoryName, name: Digest) -> None:
        images = self._without_layers.get(repo, {})
        images.pop(name, None)
        if not images:
            self._without_layers.pop(repo, None)


log = logging.getLogger("registry.mirror")

MAX_QUEUED_BLOBS: Final = 1024
"""Blobs that can be queued. Others are fetched when the client asks for them."""
FILLS_AT_ONCE: Final = 4
"""Fills at a time that no client waits for."""

ShouldPrefetch = Callable[[RepositoryName, Descriptor], Awaitable[bool]]
StartFill = Callable[[RepositoryName, Descriptor, ImagePull], Fill]


class PrefetchQueue:
    """Starts fills for queued blobs, a few at a time and in order. `should_prefetch` tells whether a blob is worth a
    request, `wait_for_spare` waits for a spare connection, `start_fill` starts the fill."""

    def __init__(
        self, should_prefetch: ShouldPrefetch, wait_for_spare: Callable[[], Awaitable[None]], start_fill: StartFill
    ) -> None:
        self._should_prefetch = should_prefetch
        self._wait_for_spare = wait_for_spare
        self._start_fill = start_fill
        self._waiting: OrderedDict[tuple[RepositoryName, Digest], tuple[Descriptor, ImagePull]] = OrderedDict()
        self._runners: set[asyncio.Task[None]] = set()
        self._closed = False

    def add(self, repo: RepositoryName, blobs: Iterable[Descriptor], pull: ImagePull, *, first: bool = False) -> None:
        """Queues blobs behind the others, or with `first` before them. A blob that is queued already is moved to this
        pull."""
        for blob in blobs:
            key = (repo, blob.digest)
            if key in self._waiting or len(self._waiting) < MAX_QUEUED_BLOBS:
                self._waiting[key] = (blob, pull)
                if first:
                    self._waiting.move_to_end(key, last=False)
        if self._closed:
            return
        for _ in range(min(FILLS_AT_ONCE - len(self._runners), len(self._waiting))):
            runner = start_detached(self._run())
            self._runners.add(runner)
            runner.add_done_callback(self._runners.discard)

    @property
    def busy(self) -> bool:
        """Whether blobs are queued or being started."""
        return bool(self._runners)

    async def aclose(self) -> None:
        """Empties the queue and starts no more fills. Running fills go on."""
        self._closed = True
        self._waiting.clear()
        await cancel_and_wait(self._runners)

    async def _run(self) -> None:
        while self._waiting:
            (repo, digest), (blob, pull) = self._waiting.popitem(last=False)
            try:
                if not pull.is_active() or not await self._should_prefetch(repo, blob):
                    continue
                await self._wait_for_spare()
                if pull.is_active():
                    await self._start_fill(repo, blob, pull).wait_wanted()
            except RegistryError as error:  # a client that asks for the blob gets the error
                log.info("%s of %s was not prefetched: %s", digest, repo, error.message)
