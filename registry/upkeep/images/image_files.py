"""Constants and functions that exports and imports of images share: names of files and annotations, media types, and
error handling.

An *OCI image layout* (OCI image spec, "Image Layout") is a directory, or a tar archive of such a directory. Its
`index.json` lists manifests. Each manifest, config and layer is a file `blobs/ALGORITHM/HEX`. A *docker archive* is a
tar archive in the format of `docker save`. Its `manifest.json` lists images. Since version 25, `docker save` writes
archives that are both docker archives and OCI image layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from storage.backups import ImageFileFailed
from storage.data_dir.system import DISK_FULL_ERRNOS
from storage.names import Digest

T = TypeVar("T")
LAYOUT_FILE: Final = "oci-layout"
LAYOUT_FILE_CONTENT: Final = b'{"imageLayoutVersion":"1.0.0"}'
INDEX_FILE: Final = "index.json"
DOCKER_MANIFEST_FILE: Final = "manifest.json"
"""The file in a docker archive that lists the images."""
REF_NAME_ANNOTATION: Final = "org.opencontainers.image.ref.name"
"""The annotation in `index.json` with the tag of an image."""
IMAGE_NAME_ANNOTATION: Final = "io.containerd.image.name"
"""The annotation in `index.json` with the name and tag of an image. Docker and containerd write and read it."""
MAX_JSON_BYTES: Final = 32 << 20
"""Largest size of a JSON file in an image layout or docker archive. Larger files are not read."""
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
DOCKER_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"


def blob_file(digest: Digest) -> str:
    """Returns the name of the file that contains a blob or manifest."""
    return f"blobs/{digest.algorithm}/{digest.encoded}"


def convert_os_errors(what: str, call: Callable[[], T]) -> T:
    """Calls `call` and returns its result. Converts an OSError to an ImageFileFailed. `what`: the beginning of the
    error message."""
    try:
        return call()
    except OSError as error:
        is_disk_full = error.errno in DISK_FULL_ERRNOS
        reason = "the disk is full; free some space on that disk" if is_disk_full else error.strerror or str(error)
        raise ImageFileFailed(f"{what}: {reason}") from error
