"""What is fetched before it is asked for, once an image is being pulled.

A client that gets an image's manifest will want its config next: hundreds of bytes. One that asks for a layer pulls the
image, so the other layers are begun too. Who only looks (HEAD, an index) makes nothing start.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, Literal

from registry.mirror.demand import Pull
from registry.mirror.flights import end
from storage.content import MANIFESTS, Descriptor, Manifest
from storage.errors import RegistryError
from storage.names import Digest, RepositoryName

log = logging.getLogger("registry.mirror")

MOST: Final = 256
"""Pulls that are kept in mind."""
Begin = Callable[[RepositoryName, Descriptor, Pull], Awaitable[object]]
Mode = Literal["off", "config", "layers"]


class _Image:
    """An image that a client fetched the manifest of."""

    def __init__(self, manifest: Manifest, clock: Callable[[], float]) -> None:
        self.pull = Pull(clock)
        self.config = manifest.config
        self.layers = manifest.layers
        self.foreign = manifest.foreign
        self.digests = frozenset(blob.digest for blob in manifest.blobs)
        self.config_begun = self.layers_begun = False


class Prefetch:
    """`begin` starts to fetch a blob; `spare` says whether requests may be spent on what nobody waits for. `clock` runs
    on, in seconds."""

    def __init__(self, mode: Mode, begin: Begin, spare: Callable[[], bool], clock: Callable[[], float]) -> None:
        self._mode = mode
        self._begin = begin
        self._spare = spare
        self._clock = clock
        self._images: OrderedDict[tuple[RepositoryName, Digest], _Image] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def on_manifest(self, repo: RepositoryName, manifest: Manifest) -> None:
        """A client got it."""
        if self._mode == "off" or manifest.media_type not in MANIFESTS:
            return
        image = self._image(repo, manifest)
        if image.config is not None and not image.config_begun and self._spare():
            image.config_begun = True
            self._start(repo, [image.config], image.pull)

    def on_blob(self, repo: RepositoryName, digest: Digest, manifests: Sequence[Manifest]) -> None:
        """A client asked for a blob that is not here; `manifests` name it, the newest first. The images begun are those
        whose manifest was fetched here of late, else the newest: a base layer is in many."""
        if self._mode != "layers" or not self._spare():
            return
        recent = [manifest for manifest in manifests if (repo, manifest.digest) in self._images]
        for manifest in recent or manifests[:1]:
            image = self._image(repo, manifest)
            if image.layers_begun or digest not in {layer.digest for layer in image.layers}:
                continue
            image.layers_begun = True
            others = [b for b in manifest.blobs if b.digest != digest and b.digest not in image.foreign]
            self._start(repo, others, image.pull)

    def pulls_of(self, digest: Digest) -> list[Pull]:
        """Those that a blob belongs to."""
        return [image.pull for image in self._images.values() if digest in image.digests]

    @property
    def busy(self) -> bool:
        """Whether something is about to be begun."""
        return bool(self._tasks)

    async def aclose(self) -> None:
        self._closed = True
        await end(self._tasks)

    def _image(self, repo: RepositoryName, manifest: Manifest) -> _Image:
        key = (repo, manifest.digest)
        image = self._images.get(key)
        if image is None or not image.pull.active():  # an older pull's blobs may be gone again
            image = self._images[key] = _Image(manifest, self._clock)
        self._images.move_to_end(key)
        image.pull.touch()
        while len(self._images) > MOST:
            self._images.popitem(last=False)
        return image

    def _start(self, repo: RepositoryName, blobs: Iterable[Descriptor], pull: Pull) -> None:
        if self._closed:
            return
        task = asyncio.create_task(self._fetch(repo, list(blobs), pull))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fetch(self, repo: RepositoryName, blobs: Sequence[Descriptor], pull: Pull) -> None:
        for blob in blobs:
            try:
                await self._begin(repo, blob, pull)
            except RegistryError as error:  # who asks for it will be told
                log.info("%s of %s was not begun ahead: %s", blob.digest, repo, error.message)
