"""Compares two images: which layers they share, and how their configs differ (`compare_images`)."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Final

from registry.browse.models import (
    ComparedImage,
    ComparedLayer,
    ComparisonView,
    ConfigChange,
    ConfigView,
    ImageView,
    ManifestView,
)
from storage.errors import ManifestUnknown

MAX_CHANGES: Final = 1000
"""How many differences are listed. Further differences are left out."""
# The fields of a config that are compared, by the type of their values.
_TEXTS: Final = ("user", "working_dir", "stop_signal", "author")
_LISTS: Final = ("entrypoint", "cmd", "healthcheck")
_SETS: Final = ("exposed_ports", "volumes")


def common_platform(base: ManifestView, other: ManifestView) -> str | None:
    """Returns the platform for which to compare two manifests if the request names none. Considers only platforms for
    which the images of both manifests are stored here. Prefers the platform of `base.image`; otherwise takes the first
    in the order of the names. Returns None if neither manifest is an index. Raises ManifestUnknown if there is no such
    platform."""
    if base.kind != "index" and other.kind != "index":
        return None
    names = [{platform.name for platform in view.platforms if platform.present} - {""} for view in (base, other)]
    preferred = base.image.platform if base.image else ""
    shared = sorted(names[0] & names[1], key=lambda name: (name != preferred, name))
    if not shared:
        raise ManifestUnknown(f"{base.reference} and {other.reference} have no platform in common that is stored here")
    return shared[0]


def compare_images(base: ManifestView, other: ManifestView) -> ComparisonView:
    """Compares the images (`ManifestView.image`) of two manifests. Raises ManifestUnknown if one of them has none."""
    base_image, other_image = _image_of(base), _image_of(other)
    base_layers, other_layers = _layers(base_image), _layers(other_image)
    shared = [layer for digest, layer in base_layers.items() if digest in other_layers]
    return ComparisonView(
        base=_compared(base, base_image),
        other=_compared(other, other_image),
        shared_layers=shared,
        base_layers=[layer for digest, layer in base_layers.items() if digest not in other_layers],
        other_layers=[layer for digest, layer in other_layers.items() if digest not in base_layers],
        shared_bytes=sum(layer.size for layer in shared),
        changes=_changes(base_image.config, other_image.config),
    )


def _image_of(view: ManifestView) -> ImageView:
    if view.image is None:
        raise ManifestUnknown(f"{view.reference} is no image that is stored here")
    return view.image


def _compared(view: ManifestView, image: ImageView) -> ComparedImage:
    return ComparedImage(
        reference=view.reference,
        digest=image.digest,
        platform=image.platform,
        size=image.size,
        created=image.config.created if image.config else None,
        has_config=image.config is not None,
    )


def _layers(image: ImageView) -> dict[str, ComparedLayer]:
    """Returns the layers of an image by digest, in their order. A layer that occurs twice is returned once."""
    layers_by_digest: dict[str, ComparedLayer] = {}
    for step in image.steps:
        if (layer := step.layer) is not None:
            compared = ComparedLayer(digest=layer.digest, size=layer.size, command=step.command)
            layers_by_digest.setdefault(layer.digest, compared)
    return layers_by_digest


def _changes(base: ConfigView | None, other: ConfigView | None) -> list[ConfigChange]:
    if base is None or other is None:
        return []
    return list(islice(_all_changes(base, other), MAX_CHANGES))


def _all_changes(base: ConfigView, other: ConfigView) -> Iterator[ConfigChange]:
    for field in _TEXTS:
        yield from _differences(field, {"": getattr(base, field)}, {"": getattr(other, field)})
    for field in _LISTS:
        yield from _differences(field, _single_value(getattr(base, field)), _single_value(getattr(other, field)))
    for field in _SETS:
        in_base, in_other = (dict.fromkeys(getattr(config, field), "") for config in (base, other))
        yield from _differences(field, in_base, in_other)
    yield from _differences("env", _variables(base.env), _variables(other.env))
    yield from _differences("labels", base.labels, other.labels)


def _differences(field: str, base: Mapping[str, str], other: Mapping[str, str]) -> Iterator[ConfigChange]:
    """Yields a change for each name whose values differ. A field with only one value has it under the empty name."""
    for name in sorted(base.keys() | other.keys()):
        if base.get(name) != other.get(name):
            yield ConfigChange(field=field, name=name, base=base.get(name), other=other.get(name))


def _single_value(words: Sequence[str] | None) -> dict[str, str]:
    """Returns a command as one text, quoted for a shell, under the empty name; an empty mapping if there is none."""
    return {} if words is None else {"": shlex.join(words)}


def _variables(env: Sequence[str]) -> dict[str, str]:
    return {name: value for name, _, value in (entry.partition("=") for entry in env)}
