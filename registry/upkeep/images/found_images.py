"""Finds the images in an OCI image layout or in an archive of `docker save` (`find_images`). The layout or archive is a
`FileSource`: a directory or a tar archive.

Docker before version 25 writes archives of the *old form*: they have configs and layers, but no manifests, so they are
not OCI image layouts. This module generates a manifest for each image of these archives. The same archive always gives
the same manifests. A config states the digests of its image's uncompressed layers. For archives of the old form, this
module checks the layers against these digests, except layers that are compressed with zstd.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from registry.upkeep.images.file_sources import FileSource, read_small
from registry.upkeep.images.image_files import (
    DOCKER_MANIFEST_FILE,
    IMAGE_NAME_ANNOTATION,
    INDEX_FILE,
    LAYOUT_FILE,
    OCI_CONFIG,
    OCI_LAYER,
    REF_NAME_ANNOTATION,
    blob_file,
)
from storage.backups import ImageFileFailed
from storage.content import INDEXES as INDEX_TYPES
from storage.content import MANIFESTS, OCI_MANIFEST, Descriptor, Manifest, digest_of
from storage.errors import RegistryError
from storage.names import Digest

CHUNK_BYTES: Final = 1 << 20
"""Number of bytes that are read from a file at once. Also the largest number of bytes that one call of the
decompressor returns."""
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
"""The first bytes of layers that are compressed with gzip and with zstd."""
_GZIP_WBITS: Final = 31
"""Makes zlib expect gzip headers, and allows the largest window."""


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image in a file source. `names`: the names with tags that the source states for the image, such as
    `team/app:1`. If the source states only a tag, the name begins with the colon, as in `:1`."""

    digest: Digest
    media_type: str
    names: tuple[str, ...] = ()


@dataclass(slots=True)
class FoundContent:
    """The images and other content of a file source.

    - `generated_manifests`: the manifests that this module has made, by digest. The source does not contain them.
    - `file_names`: the names of the files with blobs, by digest. Contains only blobs whose file has another name than
      `blob_file(digest)`."""

    source: FileSource
    images: list[FoundImage] = field(default_factory=list)
    generated_manifests: dict[Digest, bytes] = field(default_factory=dict)
    file_names: dict[Digest, str] = field(default_factory=dict)

    def file_of(self, digest: Digest) -> str:
        """Returns the name of the file that contains the blob."""
        return self.file_names.get(digest) or blob_file(digest)

    def manifest(self, digest: Digest, media_type: str) -> Manifest | None:
        """Reads a manifest, checks its digest, and returns it; None if the source does not contain the manifest.
        Blocks. Raises ImageFileFailed."""
        body = self.generated_manifests.get(digest) or read_small(self.source, blob_file(digest))
        if body is None:
            return None
        try:
            return Manifest.parse(body, media_type, digest)
        except RegistryError as error:
            raise ImageFileFailed(f"{self.source.label}: the manifest {digest} is damaged: {error.message}") from error


def find_images(source: FileSource) -> FoundContent:
    """Finds the images in `source`. Reads all layers if it is a docker archive of the old form. Blocks. Raises
    ImageFileFailed."""
    content = FoundContent(source)
    index = read_small(source, INDEX_FILE)
    if index is not None and source.size(LAYOUT_FILE) is not None:
        _read_layout(content, _parse(source, INDEX_FILE, index))
    elif (images := read_small(source, DOCKER_MANIFEST_FILE)) is not None:
        _read_docker_archive(content, _parse(source, DOCKER_MANIFEST_FILE, images))
    elif source.size("repositories") is not None:
        raise ImageFileFailed(
            f"{source.label} was written by docker before 1.10; load it into a newer docker and save it"
        )
    else:
        raise ImageFileFailed(f"{source.label} is neither an OCI image layout nor an archive of docker save")
    if not content.images:
        raise ImageFileFailed(f"{source.label} contains no images")
    return content


def _parse(source: FileSource, name: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):  # RecursionError: the JSON has deeply nested lists
        raise ImageFileFailed(f"{source.label}: {name} is not JSON") from None


def _read_layout(content: FoundContent, index: Any) -> None:
    """Adds the images of an OCI image layout to `content`. Several entries for the same manifest become one image with
    several names."""
    names: dict[tuple[Digest, str], list[str]] = {}
    try:
        for entry in index["manifests"]:
            media_type = entry["mediaType"]
            if media_type not in MANIFESTS | INDEX_TYPES:
                continue
            entry_names = names.setdefault((Digest(entry["digest"]), media_type), [])
            entry_names.extend(_names_of(entry.get("annotations") or {}))
    except (KeyError, TypeError, AttributeError, RegistryError) as error:
        raise ImageFileFailed(f"{content.source.label}: {INDEX_FILE} is not valid: {error}") from error
    content.images += [FoundImage(*key, tuple(dict.fromkeys(entry_names))) for key, entry_names in names.items()]


def _names_of(annotations: Mapping[str, Any]) -> list[str]:
    """Returns a list with the name that an entry's annotations state. The list is empty if they state none. Raises
    TypeError if a name is no text."""
    full_name, short_name = annotations.get(IMAGE_NAME_ANNOTATION), annotations.get(REF_NAME_ANNOTATION)
    for key, name in ((IMAGE_NAME_ANNOTATION, full_name), (REF_NAME_ANNOTATION, short_name)):
        if not isinstance(name, str | None):
            raise TypeError(f"the annotation {key} is no text")
    if full_name:
        return [full_name]
    if not short_name:
        return []
    return [short_name if ":" in short_name or "/" in short_name else f":{short_name}"]


def _read_docker_archive(content: FoundContent, images: Any) -> None:
    """Adds the images of a docker archive of the old form to `content`."""
    try:
        if not isinstance(images, list):
            raise TypeError("it is no list of images")
        entries = [
            (
                _require_text(image["Config"], "Config"),
                _require_texts(image["Layers"], "Layers"),
                _require_texts(image.get("RepoTags") or [], "RepoTags"),
            )
            for image in images
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ImageFileFailed(f"{content.source.label}: {DOCKER_MANIFEST_FILE} is not valid: {error}") from error
    files = {name for _, layer_files, _ in entries for name in layer_files}
    for name in files:
        if content.source.size(name) is None:
            raise ImageFileFailed(f"{content.source.label} is incomplete: it has no file {name}")
    # Each layer file is read once, in the order of the files in the archive.
    layers_by_file = {name: _hash_layer(content.source, name) for name in sorted(files, key=content.source.position)}
    for config_file, layer_files, names in entries:
        config = read_small(content.source, config_file)
        if config is None:
            raise ImageFileFailed(f"{content.source.label} is incomplete: it has no file {config_file}")
        _check_diff_ids(content.source, config_file, config, [layers_by_file[name] for name in layer_files])
        descriptors = [layers_by_file[name].descriptor for name in layer_files]
        config_descriptor = Descriptor(OCI_CONFIG, digest_of(config), len(config))
        body = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": config_descriptor.as_json(),
                "layers": [descriptor.as_json() for descriptor in descriptors],
            },
            separators=(",", ":"),
        ).encode()
        digest = digest_of(body)
        content.generated_manifests[digest] = body
        content.file_names[config_descriptor.digest] = config_file
        content.file_names.update((layers_by_file[name].descriptor.digest, name) for name in layer_files)
        content.images.append(FoundImage(digest, OCI_MANIFEST, tuple(names)))


def _require_text(value: object, key: str) -> str:
    """Returns the value if it is a text; otherwise raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{key} is no text")
    return value


def _require_texts(value: object, key: str) -> list[str]:
    """Returns the value if it is a list of texts; otherwise raises TypeError."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{key} is no list of texts")
    return value


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer of a docker archive. `diff_id`: digest of the uncompressed layer; None if it is not known."""

    descriptor: Descriptor
    diff_id: str | None


def _hash_layer(source: FileSource, name: str) -> _Layer:
    """Reads a layer and computes its digests."""
    file_hash, uncompressed_hash, size = hashlib.sha256(), hashlib.sha256(), 0
    suffix, decompressor = "", None
    try:
        with source.open(name) as file:
            while data := file.read(CHUNK_BYTES):
                if size == 0 and data.startswith(_GZIP):
                    suffix, decompressor = "+gzip", zlib.decompressobj(wbits=_GZIP_WBITS)
                elif size == 0 and data.startswith(_ZSTD):
                    suffix = "+zstd"
                file_hash.update(data)
                size += len(data)
                if decompressor is not None:
                    decompressor = _decompress(decompressor, data, uncompressed_hash)
    except zlib.error as error:
        raise ImageFileFailed(f"{source.label} is damaged or cut off at {name}: {error}") from error
    digest = f"sha256:{file_hash.hexdigest()}"
    # A zstd layer is not decompressed here, so its `diff_id` is not known.
    diff_id = digest if not suffix else f"sha256:{uncompressed_hash.hexdigest()}" if decompressor is not None else None
    return _Layer(Descriptor(OCI_LAYER + suffix, Digest(digest), size), diff_id)


def _decompress(decompressor: Any, data: bytes, uncompressed_hash: Any) -> Any:
    """Decompresses `data`, which is the next piece of a layer, and adds the result to `uncompressed_hash`. Each step
    decompresses to at most `CHUNK_BYTES`. Returns the decompressor for the piece that follows. It may be a new one,
    because a layer may consist of several gzip members, and each member needs a new decompressor."""
    while data:
        uncompressed_hash.update(decompressor.decompress(data, CHUNK_BYTES))
        if decompressor.eof:
            data = decompressor.unused_data
            if data:
                decompressor = zlib.decompressobj(wbits=_GZIP_WBITS)
        else:
            data = decompressor.unconsumed_tail
    return decompressor


def _check_diff_ids(source: FileSource, config_file: str, config: bytes, layers: list[_Layer]) -> None:
    """Raises ImageFileFailed if the digests that the config states are not the `diff_id`s of the layers, in this order.
    Accepts any digest for a layer whose `diff_id` is not known."""
    try:
        stated_digests = _require_texts(json.loads(config)["rootfs"]["diff_ids"], "diff_ids")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ImageFileFailed(f"{source.label}: the config {config_file} states no layers") from error
    if len(stated_digests) != len(layers):
        raise ImageFileFailed(
            f"{source.label}: the config {config_file} has {len(stated_digests)} layers, but {DOCKER_MANIFEST_FILE} "
            f"lists {len(layers)}"
        )
    for digest, layer in zip(stated_digests, layers, strict=True):
        if layer.diff_id is not None and layer.diff_id != digest:
            raise ImageFileFailed(
                f"{source.label}: the layer {digest} is damaged: its bytes have the digest {layer.diff_id}"
            )
