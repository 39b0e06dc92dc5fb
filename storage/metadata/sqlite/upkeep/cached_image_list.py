"""Lists the images of mirrored content by size or by last pull (`page`). An image is a root manifest with its children
and referrers. A root manifest is one that no stored index lists and whose subject is not stored. The caller runs `page`
in the thread for long lookups.

Neither the size nor the last pull of an image is stored, because both depend on all of its manifests. They are computed
for a bounded number of images, and then sorted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import apsw

from storage.cached_images import MAX_LISTED_IMAGES, CachedImage, CachedImagePage, ImageOrder
from storage.metadata.sqlite.upkeep.cached_image_tables import Image, find_image
from storage.names import Tag

_IS_ROOT = """
 NOT EXISTS (SELECT 1 FROM manifest_child i WHERE i.repository = m.repository AND i.digest = m.digest)
   AND (m.subject IS NULL
        OR NOT EXISTS (SELECT 1 FROM manifest s WHERE s.repository = m.repository AND s.digest = m.subject))"""
_ROOTS = f"""
SELECT c.manifest FROM cached_manifest c JOIN manifest m ON m.id = c.manifest
 WHERE c.upstream = ?1 AND {_IS_ROOT} ORDER BY c.rank LIMIT ?2"""
"""The root manifests of the upstream ?1. `rank` is the order in which eviction checks manifests."""
_ROOTS_BY_NAME = f"""
SELECT m.id FROM repository r CROSS JOIN manifest m ON m.repository = r.id CROSS JOIN cached_manifest c
       ON c.manifest = m.id
 WHERE r.name > ?1 || '/' AND r.name < ?1 || '0' AND instr(r.name, ?3) AND {_IS_ROOT} ORDER BY r.name LIMIT ?2
"""
"""The root manifests in the repositories of the upstream ?1 whose names contain the text ?3. "0" is the character after
the slash. With CROSS JOIN, SQLite begins with the names and does not read all manifests."""
_SIZE = """
SELECT coalesce(sum(size), 0) FROM (
  SELECT DISTINCT b.id, b.size FROM json_each(?) i JOIN manifest_blob g ON g.manifest = i.value
    JOIN blob b ON b.digest = g.digest JOIN blob_link l ON l.blob = b.id AND l.repository = g.repository)"""
"""The total size of the blobs of an image. Its parameter is the *family* as JSON: the row ids of all manifests of the
image."""
_SORT_KEYS: Final[Mapping[ImageOrder, Callable[[Image, int], float]]] = {
    ImageOrder.SIZE: lambda image, size: -size,
    ImageOrder.NEWEST_PULL: lambda image, size: -image.last_pulled,
    ImageOrder.OLDEST_PULL: lambda image, size: image.last_pulled,
}


def page(
    db: apsw.Connection, upstreams: Sequence[str], text: str, order: ImageOrder, offset: int, limit: int
) -> CachedImagePage:
    """Returns at most `limit` images of the upstreams, from the position `offset` of the list on. `text`: only images
    in repositories whose name contains it. Reads at most `MAX_LISTED_IMAGES` images. Implements
    `CachedImages.images`."""
    roots = list(_roots(db, upstreams, text))
    images = [image for root in roots[:MAX_LISTED_IMAGES] if (image := find_image(db, root)) is not None]
    sizes = {image.root: _size(db, image) for image in images} if order is ImageOrder.SIZE else {}
    sort_key = _SORT_KEYS[order]
    images.sort(key=lambda image: (sort_key(image, sizes.get(image.root, 0)), image.name, image.digest))
    listed_images = [
        CachedImage(
            image.name,
            image.digest,
            _tags(db, image.root),
            len(image.family),
            image.last_pulled,
            sizes[image.root] if image.root in sizes else _size(db, image),
        )
        for image in images[offset : offset + limit]
    ]
    return CachedImagePage(listed_images, len(images), len(roots) <= MAX_LISTED_IMAGES)


def _roots(db: apsw.Connection, upstreams: Sequence[str], text: str) -> Iterator[int]:
    """Yields the row ids of root manifests. If there are more than `MAX_LISTED_IMAGES`, yields one more than that."""
    remaining_roots = MAX_LISTED_IMAGES + 1
    for upstream in upstreams:
        parameters = (upstream, remaining_roots, text) if text else (upstream, remaining_roots)
        rows: list[Any] = db.execute(_ROOTS_BY_NAME if text else _ROOTS, parameters).fetchall()
        remaining_roots -= len(rows)
        yield from (root for (root,) in rows)


def _size(db: apsw.Connection, image: Image) -> int:
    size: Any = db.execute(_SIZE, (json.dumps(image.family),)).get
    return int(size)


def _tags(db: apsw.Connection, manifest: int) -> tuple[Tag, ...]:
    rows: list[Any] = db.execute("SELECT name FROM tag WHERE manifest = ? ORDER BY name", (manifest,)).fetchall()
    return tuple(Tag(name) for (name,) in rows)
