"""Downloads blobs that clients will probably request next. `Prefetcher` chooses the blobs, and `PrefetchQueue` starts
their *fills*. A fill is the download of one blob.

- When a client gets the manifest of an image, the image's config is queued. HEAD requests and indexes queue nothing.
- When a client requests one layer of an image, the image's other layers are queued.

The queue starts a fill whenever a connection to the upstream is free and no client waits for a connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import islice
from typing import Final, Literal

from registry.mirror.fill.demand import ImagePull
from registry.mirror.fill.fill import Fill
from registry.single_flight import cancel_and_wait, start_detached
from storage.content import MANIFESTS, Descriptor, Manifest
from storage.errors import RegistryError
from storage.names import Digest, RepositoryName

MAX_IMAGES: Final = 256
"""Largest number of images that a `Prefetcher` remembers."""
MAX_IMAGE_BLOBS: Final = 256
"""Largest number of blobs of one image that are prefetched. docker supports at most 127 layers."""
MAX_REMEMBERED_BLOBS: Final = 8192
"""Largest total number of blobs in the remembered images. Their descriptors take less than 8 MiB of memory."""
MAX_PREFETCH_MANIFEST_BYTES: Final = 256 * 1024
"""Size of the largest manifest whose blobs are prefetched. Parsing a manifest blocks the event loop."""
PrefetchMode = Literal["off", "config", "layers"]
"""What is prefetched: nothing, only configs, or configs and layers."""


class _PulledImage:
    """An image that a client pulls or has pulled.

    - `pull`: the pull of the image. It is *active* while the client keeps requesting parts of the image.
    - `config`: descriptor of the image's config; None: the image has no config.
    - `blobs`: descriptors of the config and the layers, without foreign layers, which registries do not serve.
    - `blob_digests`: the digests of `blobs`.
    - `config_queued`, `layers_queued`: whether the config and the layers have been queued."""

    def __init__(self, manifest: Manifest, clock: Callable[[], float]) -> None:
        self.pull = ImagePull(clock)
        self.config = _minimal_descriptor(manifest.config) if manifest.config else None
        foreign = manifest.foreign
        self.blobs = [
            _minimal_descriptor(blob)
            for blob in islice(
                (candidate for candidate in manifest.blobs if candidate.digest not in foreign), MAX_IMAGE_BLOBS
            )
        ]
        self.blob_digests = frozenset(blob.digest for blob in self.blobs)
        self.config_queued = self.layers_queued = False

    def has_layer(self, digest: Digest) -> bool:
        """Returns whether the blob with this digest is a layer of the image."""
        return digest in self.blob_digests and (self.config is None or digest != self.config.digest)


def _minimal_descriptor(blob: Descriptor) -> Descriptor:
    """Returns a descriptor with only the fields that a fill needs. The annotations could take as much memory as the
    manifest."""
    return Descriptor(blob.media_type, blob.digest, blob.size)


class Prefetcher:
    """Decides which blobs to prefetch, and queues them. Remembers the images that clients pull."""

    def __init__(
        self,
        mode: PrefetchMode,
        queue: PrefetchQueue,
        has_requests_left: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        """`mode`: what to prefetch. `has_requests_left`: returns whether the upstream's rate limit leaves enough
        requests for prefetching. `clock`: returns seconds of a monotonic clock."""
        self._mode = mode
        self._queue = queue
        self._has_requests_left = has_requests_left
        self._clock = clock
        self._images: OrderedDict[tuple[RepositoryName, Digest], _PulledImage] = OrderedDict()
        """The remembered images, by repository and manifest digest. The least recently used image is the first."""
        self._blob_count = 0
        """Number of blobs of all images in `_images`."""
        self._images_with_unqueued_layers: dict[RepositoryName, dict[Digest, _PulledImage]] = {}
        """The images in `_images` whose layers have not been queued, by repository and manifest digest. Saves
        `on_stored_blob` a search through all images."""

    def on_manifest(self, repo: RepositoryName, manifest: Manifest) -> None:
        """Called when a client has got a manifest. Queues the image's config at the front."""
        if self._mode == "off" or manifest.media_type not in MANIFESTS:
            return
        if len(manifest.body) > MAX_PREFETCH_MANIFEST_BYTES:
            return
        # `is_readable` parses the manifest, which takes much CPU time. A remembered manifest is known to be readable.
        if (repo, manifest.digest) not in self._images and not manifest.is_readable:
            return
        image = self._remember_image(repo, manifest)
        if image.config is not None and not image.config_queued and self._has_requests_left():
            image.config_queued = True
            self._queue.add(repo, [image.config], image.pull, at_front=True)

    def on_missing_blob(self, repo: RepositoryName, digest: Digest, manifests: Sequence[Manifest]) -> None:
        """Called when a client has requested a blob that is not stored. `manifests`: the stored manifests that name the
        blob, newest first.

        - If some of their images are remembered: queues the other layers of the remembered images.
        - If none of their images is remembered: queues the other layers of the newest manifest's image. The blob may be
          a base layer, which many images have in common."""
        if self._mode != "layers" or not self._has_requests_left():
            return
        remembered_manifests = [manifest for manifest in manifests if (repo, manifest.digest) in self._images]
        for manifest in remembered_manifests or manifests[:1]:
            self._queue_layers(repo, manifest.digest, self._remember_image(repo, manifest), digest)

    def on_stored_blob(self, repo: RepositoryName, digest: Digest) -> None:
        """Called when a client has requested a blob that is stored. Queues the other layers of each remembered image
        that has the blob as a layer and whose pull is active."""
        if self._mode != "layers" or repo not in self._images_with_unqueued_layers or not self._has_requests_left():
            return
        for manifest_digest, image in list(self._images_with_unqueued_layers[repo].items()):
            if image.pull.is_active():
                self._queue_layers(repo, manifest_digest, image, digest)

    def pulls_of(self, digest: Digest) -> list[ImagePull]:
        """Returns the pulls of the remembered images that contain the blob, including pulls that are not active."""
        return [image.pull for image in self._images.values() if digest in image.blob_digests]

    @property
    def is_busy(self) -> bool:
        """Whether the queue is busy: see `PrefetchQueue.is_busy`."""
        return self._queue.is_busy

    async def aclose(self) -> None:
        """Empties the queue, and starts no more fills. Running fills continue."""
        await self._queue.aclose()

    def _queue_layers(
        self, repo: RepositoryName, manifest_digest: Digest, image: _PulledImage, requested: Digest
    ) -> None:
        """Queues the config and the layers of `image`, except `requested`, the layer that the client has requested.
        Does nothing if `requested` is not a layer of the image, or if the layers have been queued before."""
        if image.layers_queued or not image.has_layer(requested):
            return
        image.layers_queued = True
        self._forget_unqueued_layers(repo, manifest_digest)
        self._queue.add(repo, (blob for blob in image.blobs if blob.digest != requested), image.pull)

    def _remember_image(self, repo: RepositoryName, manifest: Manifest) -> _PulledImage:
        """Remembers the image with this manifest, makes its pull active, and returns the image. Creates a new object if
        the image is not remembered yet, or if its pull is no longer active."""
        key = (repo, manifest.digest)
        image = self._images.get(key)
        # The blobs may have been deleted since the pull was active. With a new object, they are queued again.
        if image is None or not image.pull.is_active():
            self._blob_count -= len(image.blobs) if image else 0
            image = self._images[key] = _PulledImage(manifest, self._clock)
            self._blob_count += len(image.blobs)
            if self._mode == "layers":
                self._images_with_unqueued_layers.setdefault(repo, {})[manifest.digest] = image
        self._images.move_to_end(key)
        image.pull.touch()
        while len(self._images) > MAX_IMAGES or self._blob_count > MAX_REMEMBERED_BLOBS:
            oldest_key, oldest = self._images.popitem(last=False)
            self._blob_count -= len(oldest.blobs)
            self._forget_unqueued_layers(*oldest_key)
        return image

    def _forget_unqueued_layers(self, repo: RepositoryName, manifest_digest: Digest) -> None:
        """Removes an image from `_images_with_unqueued_layers`. Does nothing if the image is not in the dict. Called in
        two cases: the image's layers are about to be queued, or the image is no longer remembered."""
        images = self._images_with_unqueued_layers.get(repo, {})
        images.pop(manifest_digest, None)
        if not images:
            self._images_with_unqueued_layers.pop(repo, None)


log = logging.getLogger("registry.mirror")

MAX_QUEUED_BLOBS: Final = 1024
"""Largest length of the queue. A full queue takes no further blobs."""
MAX_RUNNING_FILLS: Final = 4
"""Largest number of fills that one process runs for blobs which no client has requested yet."""

ShouldPrefetch = Callable[[RepositoryName, Descriptor], Awaitable[bool]]
"""Returns whether to download a blob: True if this registry does not store the blob and the upstream may have it.
Raises RegistryError."""
StartFill = Callable[[RepositoryName, Descriptor, ImagePull], Fill]
"""Starts the fill of a blob for a pull and returns the fill. If a fill of the blob is running, returns the running
fill. The fill ends when the pull is no longer active, unless a client has requested the blob. Raises RegistryError."""


class PrefetchQueue:
    """The queue of blobs to prefetch. Starts their fills in the order of the queue, up to `MAX_RUNNING_FILLS` at a
    time."""

    def __init__(
        self,
        should_prefetch: ShouldPrefetch,
        wait_for_prefetch_slot: Callable[[], Awaitable[None]],
        start_fill: StartFill,
    ) -> None:
        """`should_prefetch`: called before a fill is started. `wait_for_prefetch_slot`: waits until a connection to the
        upstream is free and no client waits for a connection."""
        self._should_prefetch = should_prefetch
        self._wait_for_prefetch_slot = wait_for_prefetch_slot
        self._start_fill = start_fill
        self._queued: OrderedDict[tuple[RepositoryName, Digest], tuple[Descriptor, ImagePull]] = OrderedDict()
        self._runners: set[asyncio.Task[None]] = set()
        """The tasks that run `_process_queue`, at most `MAX_RUNNING_FILLS`."""
        self._closed = False

    def add(
        self, repo: RepositoryName, blobs: Iterable[Descriptor], pull: ImagePull, *, at_front: bool = False
    ) -> None:
        """Adds blobs of `repo` to the end of the queue. With `at_front`, adds or moves each blob to the start. A blob
        that was already queued gets the new `pull`. No fill starts for a blob whose pull is no longer active when its
        turn comes."""
        for blob in blobs:
            key = (repo, blob.digest)
            if key in self._queued or len(self._queued) < MAX_QUEUED_BLOBS:
                self._queued[key] = (blob, pull)
                if at_front:
                    self._queued.move_to_end(key, last=False)
        if self._closed:
            return
        for _ in range(min(MAX_RUNNING_FILLS - len(self._runners), len(self._queued))):
            runner = start_detached(self._process_queue())
            self._runners.add(runner)
            runner.add_done_callback(self._runners.discard)

    @property
    def is_busy(self) -> bool:
        """True while a blob is queued, or while a fill that the queue has started downloads a blob that no client has
        requested."""
        return bool(self._runners)

    async def aclose(self) -> None:
        """Empties the queue, and starts no more fills. Running fills continue."""
        self._closed = True
        self._queued.clear()
        await cancel_and_wait(self._runners)

    async def _process_queue(self) -> None:
        """Starts the fills of queued blobs one after the other. After each start, waits until a client requests the
        blob or the fill ends."""
        while self._queued:
            (repo, digest), (blob, pull) = self._queued.popitem(last=False)
            try:
                if not pull.is_active() or not await self._should_prefetch(repo, blob):
                    continue
                await self._wait_for_prefetch_slot()
                if pull.is_active():
                    await self._start_fill(repo, blob, pull).wait_until_requested()
            except RegistryError as error:  # only logged: a client that requests the blob gets the error
                log.info("%s of %s was not prefetched: %s", digest, repo, error.message)
