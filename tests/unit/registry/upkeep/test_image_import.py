"""The import of a file with images (`entrepot import FILE`) gives no repository a blob whose bytes the file lacks, and
does not change the media type of a manifest that an immutable tag needs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from registry.naming import NamingRules
from registry.router import Router
from registry.upkeep.images.file_sources import open_file_source
from registry.upkeep.images.found_images import find_images
from registry.upkeep.images.image_import import ImportName, import_images
from storage.backups import ImageFileFailed
from storage.composition import open_registry, prepare_data_dir
from storage.content import DOCKER_LIST, OCI_INDEX, Actor, Manifest, digest_of
from storage.errors import BlobUnknown, ManifestUnknown
from storage.names import Digest, RepositoryName, Tag
from storage.patterns import NamePattern
from storage.store.stored_registry import StoredRegistry
from storage.tag_rules import ImmutableTags, TagPattern, TagRule
from storage.upkeep.reporter import PlainReporter
from tests.fakes.client_images import image, layer, noise, write_layout

SECRET = image("secret", layer({"noise": noise("secret", 1000)}))
"""The image that an account without rights on its repository wants to read."""
SECRET_LAYER = SECRET.layers[-1]
EVIL = RepositoryName("evil/file")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data") as opened:
        yield opened


async def import_layout(store: StoredRegistry, layout: Path, name: str) -> Any:
    router = Router(store, {}, store.is_known_repository, NamingRules())
    reporter = PlainReporter(lambda _: None, lambda _: None)
    with open_file_source(layout) as source:
        content, by = find_images(source), Actor("cli:ann")
        return await import_images(router, content, ImportName.parse(name), by, reporter, store.imports)


async def assert_not_in_evil(store: StoredRegistry) -> None:
    with pytest.raises(BlobUnknown):
        await store.resolve_blob(EVIL, Digest(SECRET_LAYER.digest))


async def test_a_missing_blob_is_not_taken_from_another_repository(store: StoredRegistry, tmp_path: Path) -> None:
    """The layout names a layer that it does not contain, and another repository has that layer. The import fails, and
    the repository does not get the layer."""
    layout = write_layout(tmp_path / "layout", {"v1": SECRET})
    await import_layout(store, layout, "bob/secret:v1")
    (layout / "blobs/sha256" / SECRET_LAYER.digest.partition(":")[2]).unlink()
    with pytest.raises(ImageFileFailed, match=f"is incomplete: it has no blob {SECRET_LAYER.digest}"):
        await import_layout(store, layout, "evil/file:v1")
    await assert_not_in_evil(store)


async def test_a_damaged_blob_is_not_taken_from_another_repository(store: StoredRegistry, tmp_path: Path) -> None:
    """The file of the layer has the right name and size, but other bytes than the layer in another repository. The
    import fails, and the repository does not get the layer."""
    layout = write_layout(tmp_path / "layout", {"v1": SECRET})
    await import_layout(store, layout, "bob/secret:v1")
    (layout / "blobs/sha256" / SECRET_LAYER.digest.partition(":")[2]).write_bytes(bytes(len(SECRET_LAYER.body)))
    with pytest.raises(ImageFileFailed, match=f"the blob {SECRET_LAYER.digest} is damaged"):
        await import_layout(store, layout, "evil/file:v1")
    await assert_not_in_evil(store)


async def test_blobs_of_another_repository_are_not_stored_again(store: StoredRegistry, tmp_path: Path) -> None:
    """If the file contains the blobs of an image that another repository has, the import adds them without storing
    their bytes again."""
    layout = write_layout(tmp_path / "layout", {"v1": SECRET})
    first = await import_layout(store, layout, "bob/secret:v1")
    assert (first["new_blobs"], first["present_blobs"]) == (len(SECRET.blobs), 0)
    second = await import_layout(store, layout, "team/copy:v1")
    assert (second["new_blobs"], second["present_blobs"], second["size"]) == (0, len(SECRET.blobs), 0)
    assert (await store.resolve_blob(RepositoryName("team/copy"), Digest(SECRET_LAYER.digest))).size


APP = RepositoryName("team/app")
RULES = ImmutableTags([TagRule((NamePattern("**"),), (TagPattern("v*"),))])
"""Makes tags that begin with `v` immutable."""


@pytest.fixture
async def strict_store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    """A store with the immutable tags of `RULES`."""
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data", immutable_tags=RULES) as opened:
        yield opened


def index_body(number: int, **fields: Any) -> bytes:
    """Returns an index without a media type, so that its Content-Type decides. `number` makes it differ from others."""
    return json.dumps({"schemaVersion": 2, "manifests": [], "annotations": {"n": str(number)}, **fields}).encode()


def descriptor(body: bytes, media_type: str, **annotations: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(body), "size": len(body), "annotations": annotations}


def write_indexes(path: Path, named: dict[str, tuple[bytes, str]], *others: tuple[bytes, str]) -> Path:
    """Writes a layout with indexes of team/app. `named`: the body and the media type, by tag. `others`: those of the
    indexes without a tag."""
    files = {body for body, _ in (*named.values(), *others)}
    (path / "blobs/sha256").mkdir(parents=True)
    for body in files:
        (path / "blobs/sha256" / digest_of(body).encoded).write_bytes(body)
    entries = [
        descriptor(body, media_type, **{"io.containerd.image.name": f"team/app:{tag}"})
        for tag, (body, media_type) in named.items()
    ]
    entries += [descriptor(body, media_type) for body, media_type in others]
    (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    return path


async def push_index(store: StoredRegistry, body: bytes, tag: str) -> None:
    await store.put_manifest(APP, Manifest.parse(body, OCI_INDEX, digest_of(body)), [Tag(tag)], by=Actor("cli:ann"))


async def import_indexes(store: StoredRegistry, layout: Path) -> tuple[Any, list[Any]]:
    """Imports a layout. Returns the result and the problems."""
    steps: list[Any] = []
    router = Router(store, {}, store.is_known_repository, NamingRules())
    reporter = PlainReporter(steps.append, lambda _: None)
    with open_file_source(layout) as source:
        result = await import_images(
            *(router, find_images(source), None, Actor("cli:ann"), reporter, store.imports), immutable_tags=RULES
        )
    return result, [(step["image"], step["reason"]) for step in steps if step["event"] == "problem"]


async def test_media_type_that_an_immutable_tag_needs(strict_store: StoredRegistry, tmp_path: Path) -> None:
    """An image that would change the media type of an immutable tag's manifest, and an image with such a child, are
    problems. The other images of the file are imported."""
    needed, other = index_body(1), index_body(2)
    parent = index_body(3, manifests=[descriptor(needed, DOCKER_LIST)])
    await push_index(strict_store, needed, "v1")
    layout = write_indexes(
        tmp_path / "layout",
        {"v1": (needed, DOCKER_LIST), "parent": (parent, OCI_INDEX), "dev": (other, OCI_INDEX)},
    )
    result, problems = await import_indexes(strict_store, layout)
    reason = (
        f"team/app:v1 is immutable and needs {digest_of(needed)} with media type {OCI_INDEX}; "
        "push the manifest with this Content-Type"
    )
    assert problems == [("team/app:v1", reason), ("team/app:parent", reason)]
    assert (result["images"], result["problems"]) == (1, 2)
    assert (await strict_store.resolve_manifest(APP, Tag("dev"))).digest == digest_of(other)


async def test_referrer_that_an_immutable_tag_needs(strict_store: StoredRegistry, tmp_path: Path) -> None:
    """A referrer is a problem if the import would change its media type and an immutable tag points at it. Referrers of
    this referrer are left out, and the other content of the file is imported."""
    subject = index_body(1)
    referrer = index_body(2, subject=descriptor(subject, OCI_INDEX))
    second = index_body(3, subject=descriptor(referrer, OCI_INDEX))
    last = index_body(4, subject=descriptor(subject, OCI_INDEX))
    await push_index(strict_store, referrer, "v1")
    layout = write_indexes(
        *(tmp_path / "layout", {"dev": (subject, OCI_INDEX)}),
        *((referrer, DOCKER_LIST), (second, OCI_INDEX), (last, OCI_INDEX)),
    )
    result, [(image_name, reason)] = await import_indexes(strict_store, layout)
    assert image_name == f"team/app@{digest_of(referrer)}"
    assert reason.startswith("team/app:v1 is immutable and needs")
    assert (result["images"], result["problems"]) == (1, 1)
    assert (await strict_store.resolve_manifest(APP, digest_of(last))).digest == digest_of(last)
    with pytest.raises(ManifestUnknown):
        await strict_store.resolve_manifest(APP, digest_of(second))


async def test_referrer_of_a_child_of_a_refused_index(strict_store: StoredRegistry, tmp_path: Path) -> None:
    """A referrer of a child of an index is left out if the index is refused."""
    child = index_body(1)
    parent = index_body(2, manifests=[descriptor(child, OCI_INDEX)])
    referrer = index_body(3, subject=descriptor(child, OCI_INDEX))
    await push_index(strict_store, index_body(4), "v1")
    layout = write_indexes(
        *(tmp_path / "layout", {"v1": (parent, OCI_INDEX), "dev": (index_body(5), OCI_INDEX)}),
        (referrer, OCI_INDEX),
    )
    (layout / "blobs/sha256" / digest_of(child).encoded).write_bytes(child)
    result, [(image_name, _)] = await import_indexes(strict_store, layout)
    assert (image_name, result["images"], result["problems"]) == ("team/app:v1", 1, 1)


async def test_referrer_of_a_referrer_without_its_immutable_tag(strict_store: StoredRegistry, tmp_path: Path) -> None:
    """A named referrer cannot get its tag, because the tag is immutable and points at another manifest. The referrer is
    stored without the tag, and so are its own referrers."""
    subject = index_body(1)
    referrer = index_body(2, subject=descriptor(subject, OCI_INDEX))
    last = index_body(3, subject=descriptor(referrer, OCI_INDEX))
    await push_index(strict_store, index_body(4), "v1")
    layout = write_indexes(
        *(tmp_path / "layout", {"dev": (subject, OCI_INDEX), "v1": (referrer, OCI_INDEX)}), (last, OCI_INDEX)
    )
    result, [(image_name, _)] = await import_indexes(strict_store, layout)
    assert (image_name, result["images"], result["problems"]) == ("team/app:v1", 1, 1)
    for body in (referrer, last):
        assert (await strict_store.resolve_manifest(APP, digest_of(body))).digest == digest_of(body)


@pytest.mark.slow
async def test_imported_tags_are_in_the_natural_order_of_their_names(store: StoredRegistry, tmp_path: Path) -> None:
    """Of the images in one file, `9` counts as older than `10`. They count as pulled at the time of the import. A
    second import of the same images does not extend this time."""
    names = [str(number) for number in range(1, 12)]
    images = {name: image(name, layer({"noise": noise(name, 100)})) for name in sorted(names)}
    layout = write_layout(tmp_path / "layout", images)
    repo = RepositoryName("team/app")
    await import_layout(store, layout, repo)
    tags = await store.retention.tag_facts(repo, None)
    assert [tag.name for tag in sorted(tags, key=lambda tag: tag.pushed)] == names
    imported_at = [tag.unrecorded_until for tag in tags]
    assert all(imported_at)
    await import_layout(store, layout, repo)
    assert [tag.unrecorded_until for tag in await store.retention.tag_facts(repo, None)] == imported_at


async def test_the_images_before_an_error_count_as_imported(store: StoredRegistry, tmp_path: Path) -> None:
    """An import of a large file can take hours. So each image counts as pulled as soon as it is imported, also if the
    import ends with an error."""
    images = {name: image(name, layer({"noise": noise(name, 100)})) for name in ("a", "b")}
    layout = write_layout(tmp_path / "layout", images)
    (layout / "blobs/sha256" / images["b"].layers[-1].digest.partition(":")[2]).unlink()
    with pytest.raises(ImageFileFailed):
        await import_layout(store, layout, APP)
    [tag] = await store.retention.tag_facts(APP, None)
    assert tag.name == "a"
    assert tag.unrecorded_until is not None
