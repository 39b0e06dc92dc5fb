"""What is fetched before it is asked for, once an image is being pulled.

A client that gets an image's manifest will want its config next: hundreds of bytes. One that asks for a layer pulls the
image, so the other layers are begun too. Who only looks (HEAD, an index) makes nothing start.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final, Literal

from registry.mirror.ahead import Ahead
from registry.mirror.demand import Pull
from storage.content import MANIFESTS, Descriptor, Manifest
from storage.names import Digest, RepositoryName

MOST: Final = 256
"""Pulls that are kept in mind."""
BLOBS: Final = 256
"""Blobs of one image that are fetched ahead; docker knows 127 layers at the most."""
READ_SIZE: Final = 256 * 1024
"""Bytes of a manifest that is read, on the event loop, to fetch ahead what it names."""
Mode = Literal["off", "config", "layers"]


class _Image:
    """An image that a client fetched the manifest of, or a layer."""

    def __init__(self, manifest: Manifest, clock: Callable[[], float]) -> None:
        self.pull = Pull(clock)
        self.config = _plain(manifest.config) if manifest.config else None
        foreign = manifest.foreign
        self.blobs = [_plain(blob) for blob in islice((b for b in manifest.blobs if b.digest not in foreign), BLOBS)]
        self.digests = frozenset(blob.digest for blob in self.blobs)
        self.config_begun = self.layers_begun = False

    def has_layer(self, digest: Digest) -> bool:
        return digest in self.digests and (self.config is None or digest != self.config.digest)


def _plain(blob: Descriptor) -> Descriptor:
    """What it takes to fetch it. Annotations may be as large as the manifest, and images are kept in mind for long."""
    return Descriptor(blob.media_type, blob.digest, blob.size)


class Prefetch:
    """`spare` says whether requests may be spent on what nobody waits for. `clock` runs on, in seconds."""

    def __init__(self, mode: Mode, ahead: Ahead, spare: Callable[[], bool], clock: Callable[[], float]) -> None:
        self._mode = mode
        self._ahead = ahead
        self._spare = spare
        self._clock = clock
        self._images: OrderedDict[tuple[RepositoryName, Digest], _Image] = OrderedDict()
        self._untouched: dict[RepositoryName, dict[Digest, _Image]] = {}
        """Those of `_images` of which no layer was asked for yet, so that a look for them costs nothing once all are
        begun."""

    def on_manifest(self, repo: RepositoryName, manifest: Manifest) -> None:
        """A client got it."""
        if self._mode == "off" or manifest.media_type not in MANIFESTS:
            return
        if len(manifest.body) > READ_SIZE or not manifest.readable:
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

    def pulls_of(self, digest: Digest) -> list[Pull]:
        """Those that a blob belongs to."""
        return [image.pull for image in self._images.values() if digest in image.digests]

    @property
    def busy(self) -> bool:
        """Whether something is about to be begun."""
        return self._ahead.busy

    async def aclose(self) -> None:
        await self._ahead.aclose()

    def _begin_layers(self, repo: RepositoryName, name: Digest, image: _Image, asked: Digest) -> None:
        if image.layers_begun or not image.has_layer(asked):
            return
        image.layers_begun = True
        self._touch(repo, name)
        self._ahead.add(repo, (blob for blob in image.blobs if blob.digest != asked), image.pull)

    def _image(self, repo: RepositoryName, manifest: Manifest) -> _Image:
        key = (repo, manifest.digest)
        image = self._images.get(key)
        if image is None or not image.pull.active():  # an older pull's blobs may be gone again
            image = self._images[key] = _Image(manifest, self._clock)
            if self._mode == "layers":
                self._untouched.setdefault(repo, {})[manifest.digest] = image
        self._images.move_to_end(key)
        image.pull.touch()
        while len(self._images) > MOST:
            old, _ = self._images.popitem(last=False)
            self._touch(*old)
        return image

    def _touch(self, repo: RepositoryName, name: Digest) -> None:
        images = self._untouched.get(repo, {})
        images.pop(name, None)
        if not images:
            self._untouched.pop(repo, None)
