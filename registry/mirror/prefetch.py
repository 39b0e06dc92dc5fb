"""What is fetched before it is asked for, once an image is being pulled.

A client that gets an image's manifest will want its config next: hundreds of bytes. One that asks for a layer pulls the
image, so the other layers are begun too. Who only looks (HEAD, an index) makes nothing start.

What is to be fetched before anybody asks for it, in order and a few at once.

What waits here is a name and no more: no file is open for it, and nothing looks at it until there is a connection that
nobody else wants.
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
from registry.request import detached_context
from registry.single_flight import cancel_and_wait
from storage.content import MANIFESTS, Descriptor, Manifest
from storage.errors import RegistryError
from storage.names import Digest, RepositoryName

MAX_IMAGES: Final = 256
"""Pulls that are kept in mind."""
MAX_IMAGE_BLOBS: Final = 256
"""Blobs of one image that are fetched ahead; docker knows 127 layers at the most."""
MAX_MANIFEST_SIZE: Final = 256 * 1024
"""Bytes of a manifest that is read, on the event loop, to fetch ahead what it names."""
PrefetchMode = Literal["off", "config", "layers"]


class _PulledImage:
    """An image that a client fetched the manifest of, or a layer."""

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
    """What it takes to fetch it. Annotations may be as large as the manifest, and images are kept in mind for long."""
    return Descriptor(blob.media_type, blob.digest, blob.size)


class Prefetcher:
    """`spare` says whether requests may be spent on what nobody waits for. `clock` runs on, in seconds."""

    def __init__(
        self, mode: PrefetchMode, ahead: PrefetchQueue, spare: Callable[[], bool], clock: Callable[[], float]
    ) -> None:
        self._mode = mode
        self._ahead = ahead
        self._spare = spare
        self._clock = clock
        self._images: OrderedDict[tuple[RepositoryName, Digest], _PulledImage] = OrderedDict()
        self._untouched: dict[RepositoryName, dict[Digest, _PulledImage]] = {}
        """Those of `_images` of which no layer was asked for yet, so that a look for them costs nothing once all are
        begun."""

    def on_manifest(self, repo: RepositoryName, manifest: Manifest) -> None:
        """A client got it."""
        if self._mode == "off" or manifest.media_type not in MANIFESTS:
            return
        if len(manifest.body) > MAX_MANIFEST_SIZE or not manifest.readable:
            return
        image = self._image(repo, manifest)
        if image.config is not None and not image.config_begun and self._spare():
            image.config_begun = True
            self._ahead.add(repo, [image.config], image.pull, first=True)

    def on_blob(self, repo: RepositoryName, digest: Digest, manifests: Sequence[Manifest]) -> None:
        """A client asked for a blob that is not here; `manifests` name it, the newest first. The images begun are those
        whose manifest was fetched here of late, else the newest: a base layer is in many."""
        if self._mode != "layers" or not self._spare():
            return
        recent = [manifest for manifest in manifests if (repo, manifest.digest) in self._images]
        for manifest in recent or manifests[:1]:
            self._begin_layers(repo, manifest.digest, self._image(repo, manifest), digest)

    def on_hit(self, repo: RepositoryName, digest: Digest) -> None:
        """A client asked for a blob that is here: it will ask for the others of images whose manifest was fetched here
        of late."""
        if self._mode != "layers" or repo not in self._untouched or not self._spare():
            return
        for name, image in list(self._untouched[repo].items()):
            if image.pull.active():
                self._begin_layers(repo, name, image, digest)

    def pulls_of(self, digest: Digest) -> list[ImagePull]:
        """Those that a blob belongs to."""
        return [image.pull for image in self._images.values() if digest in image.digests]

    @property
    def busy(self) -> bool:
        """Whether something is about to be begun."""
        return self._ahead.busy

    async def aclose(self) -> None:
        await self._ahead.aclose()

    def _begin_layers(self, repo: RepositoryName, name: Digest, image: _PulledImage, asked: Digest) -> None:
        if image.layers_begun or not image.has_layer(asked):
            return
        image.layers_begun = True
        self._touch(repo, name)
        self._ahead.add(repo, (blob for blob in image.blobs if blob.digest != asked), image.pull)

    def _image(self, repo: RepositoryName, manifest: Manifest) -> _PulledImage:
        key = (repo, manifest.digest)
        image = self._images.get(key)
        if image is None or not image.pull.active():  # an older pull's blobs may be gone again
            image = self._images[key] = _PulledImage(manifest, self._clock)
            if self._mode == "layers":
                self._untouched.setdefault(repo, {})[manifest.digest] = image
        self._images.move_to_end(key)
        image.pull.touch()
        while len(self._images) > MAX_IMAGES:
            old, _ = self._images.popitem(last=False)
            self._touch(*old)
        return image

    def _touch(self, repo: RepositoryName, name: Digest) -> None:
        images = self._untouched.get(repo, {})
        images.pop(name, None)
        if not images:
            self._untouched.pop(repo, None)


log = logging.getLogger("registry.mirror")

MAX_QUEUED_BLOBS: Final = 1024
"""Blobs that may wait; who pulls will ask for the others anyway."""
FILLS_AT_ONCE: Final = 4
"""Fills that nobody waits for."""

ShouldPrefetch = Callable[[RepositoryName, Descriptor], Awaitable[bool]]
StartFill = Callable[[RepositoryName, Descriptor, ImagePull], Fill]


class PrefetchQueue:
    """`should_prefetch` says whether a blob is worth asking for, `room` waits for a connection, `begin` begins a
    fill."""

    def __init__(self, lacks: ShouldPrefetch, room: Callable[[], Awaitable[None]], begin: StartFill) -> None:
        self._lacks = lacks
        self._room = room
        self._begin = begin
        self._waiting: OrderedDict[tuple[RepositoryName, Digest], tuple[Descriptor, ImagePull]] = OrderedDict()
        self._runners: set[asyncio.Task[None]] = set()
        self._closed = False

    def add(self, repo: RepositoryName, blobs: Iterable[Descriptor], pull: ImagePull, *, first: bool = False) -> None:
        """They come after what waits already, or `first`. One that waits is kept for this pull instead of its own."""
        for blob in blobs:
            key = (repo, blob.digest)
            if key in self._waiting or len(self._waiting) < MAX_QUEUED_BLOBS:
                self._waiting[key] = (blob, pull)
                if first:
                    self._waiting.move_to_end(key, last=False)
        if self._closed:
            return
        for _ in range(min(FILLS_AT_ONCE - len(self._runners), len(self._waiting))):
            runner = asyncio.create_task(self._run(), context=detached_context())
            self._runners.add(runner)
            runner.add_done_callback(self._runners.discard)

    @property
    def busy(self) -> bool:
        """Whether something is under way or about to be."""
        return bool(self._runners)

    async def aclose(self) -> None:
        """Begins nothing more. What was begun is not this one's."""
        self._closed = True
        self._waiting.clear()
        await cancel_and_wait(self._runners)

    async def _run(self) -> None:
        while self._waiting:
            (repo, digest), (blob, pull) = self._waiting.popitem(last=False)
            try:
                if not pull.active() or not await self._lacks(repo, blob):
                    continue
                await self._room()
                if pull.active():
                    await self._begin(repo, blob, pull).wait_wanted()
            except RegistryError as error:  # who asks for it will be told
                log.info("%s of %s was not begun ahead: %s", digest, repo, error.message)
