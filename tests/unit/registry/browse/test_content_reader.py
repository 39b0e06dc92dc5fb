"""`ContentReader` reads manifests and keeps summaries of them in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.browse import content_reader
from registry.browse.content_reader import MAX_PREDICATES, MAX_ROW_BYTES, ContentReader, parse_summary
from storage.content import Descriptor, Manifest, digest_of
from storage.memory_registry import MemoryRegistry
from tests.fakes.registry_content import CONFIG_TYPE, descriptor_of, image_of, index_of

CONFIG = descriptor_of(b"{}", CONFIG_TYPE)


def image_with_predicates(predicates: int, characters: int = 0) -> Manifest:
    """Returns an image whose layers name `predicates` different predicate types (kinds of attestation). Each has about
    `characters` characters."""
    layer = descriptor_of(b"layer")
    notes = [{"in-toto.io/predicate-type": f"{number}" + "x" * characters} for number in range(predicates)]
    return image_of(CONFIG, [replace(layer, annotations=note) for note in notes])


def index(number: int, entries: int = 50) -> Manifest:
    return index_of([Descriptor(CONFIG_TYPE, digest_of(b"%d/%d" % (number, each)), 7) for each in range(entries)])


def cached_count(reader: ContentReader, manifests: list[Manifest]) -> int:
    """Returns how many of these manifests have a summary in memory."""
    return sum(reader._manifests.get(manifest.digest) is not None for manifest in manifests)


def test_a_summary_names_a_limited_number_of_predicates() -> None:
    """A summary names at most `MAX_PREDICATES` predicate types."""
    assert len(parse_summary(image_with_predicates(5)).predicates) == 5
    assert len(parse_summary(image_with_predicates(MAX_PREDICATES + 50)).predicates) == MAX_PREDICATES


@pytest.mark.slow
async def test_summaries_take_a_limited_amount_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The summaries that were used most recently stay in memory. With the same limit, more small summaries than large
    ones fit."""
    monkeypatch.setattr(content_reader, "_MAX_CACHED_BYTES", 100_000)
    reader = ContentReader(MemoryRegistry())
    small, large = [index(number, 1) for number in range(100)], [index(number) for number in range(100)]
    for manifest in small + large:
        await reader.summarize(manifest)
    cached_large = cached_count(reader, large)
    assert (cached_count(reader, small), cached_count(reader, large[-cached_large:])) == (0, cached_large)
    for manifest in small:
        await reader.summarize(manifest)
    assert 1 <= cached_large < cached_count(reader, small)


async def test_the_summary_of_a_large_manifest_is_not_cached() -> None:
    """A large manifest is summarized, but its summary is not kept in memory."""
    reader = ContentReader(MemoryRegistry())
    large = image_of(CONFIG, annotations={"note": "x" * MAX_ROW_BYTES})
    assert (await reader.summarize(large)).kind == "image"
    assert cached_count(reader, [large]) == 0
