"""Lists the images of mirrored content by size or by last pull (`read_page`). An image is a root manifest with its
children and referrers. A root manifest is one that no stored index lists and whose subject is not stored.

The store has neither the size nor the last pull of an image. So `read_page` computes them for at most
`MAX_LISTED_IMAGES` images, and then sorts these images. The caller runs `read_page` in the thread for long lookups.
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
"""At most ?2 root manifests of the upstream ?1. `rank` is the order in which eviction checks manifests."""
_ROOTS_BY_NAME = f"""
SELECT m.id FROM repository r CROSS JOIN manifest m ON m.repository = r.id CROSS JOIN cached_manifest c
       ON c.manifest = m.id
 WHERE r.name > ?1 || '/' AND r.name < ?1 || '0' AND instr(r.name, ?3) AND {_IS_ROOT} ORDER BY r.name LIMIT ?2
"""
"""At most ?2 root manifests of the upstream ?1, in repositories whose names contain the text ?3. The names begin
with the upstream's name and "/". "0" is the next character after "/". CROSS JOIN makes SQLite look up the names first,
instead of reading all manifests."""
_SIZE = """
SELECT coalesce(sum(size), 0) FROM (
  SELECT DISTINCT b.id, b.size FROM json_each(?) i JOIN manifest_blob g ON g.manifest = i.value
    JOIN blob b ON b.digest = g.digest JOIN blob_link l ON l.blob = b.id AND l.repository = g.repository)"""
"""The total size of an image's stored blobs, in bytes. The parameter is the image's *family* as a JSON array: the row
ids of all its manifests."""
_SORT_KEYS: Final[Mapping[ImageOrder, Callable[[Image, int], float]]] = {
    ImageOrder.SIZE: lambda image, size: -size,
    ImageOrder.NEWEST_PULL: lambda image, size: -image.last_pulled,
    ImageOrder.OLDEST_PULL: lambda image, size: image.last_pulled,
}


def read_page(
    db: apsw.Connection, upstreams: Sequence[str], text: str, order: ImageOrder, offset: int, limit: int
) -> CachedImagePage:
    """Implements `CachedImages.images`: returns at most `limit` images of the upstreams, beginning at the position
    `offset` of the list. `text`: a text that the repository's name contains; empty for all repositories. Reads at most
    `MAX_LISTED_IMAGES` images."""
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
    """Yields the row ids of at most `MAX_LISTED_IMAGES + 1` root manifests. The additional one shows that the list is
    not complete."""
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
