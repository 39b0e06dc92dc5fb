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
"""Largest number of differences that are listed. Further differences are left out."""
# The compared fields of a config, by the type of their values.
_TEXTS: Final = ("user", "working_dir", "stop_signal", "author")
_LISTS: Final = ("entrypoint", "cmd", "healthcheck")
_SETS: Final = ("exposed_ports", "volumes")


def common_platform(base: ManifestView, other: ManifestView) -> str | None:
    """Returns the platform for a comparison of two manifests, if the request names no platform. A platform is *common*
    if the images of both manifests for this platform are stored here. Returns the platform of `base.image` if it is
    common, and otherwise the first common platform by name. Returns None if neither manifest is an index. Raises
    ManifestUnknown if no platform is common."""
    if base.kind != "index" and other.kind != "index":
        return None
    names = [{platform.name for platform in view.platforms if platform.present} - {""} for view in (base, other)]
    preferred = base.image.platform if base.image else ""
    shared = sorted(names[0] & names[1], key=lambda name: (name != preferred, name))
    if not shared:
        raise ManifestUnknown(f"{base.reference} and {other.reference} have no platform in common that is stored here")
    return shared[0]


def compare_images(base: ManifestView, other: ManifestView) -> ComparisonView:
    """Compares the images (`ManifestView.image`) of two manifests. Raises ManifestUnknown if a manifest has no
    image."""
    base_image, other_image = _existing_image(base), _existing_image(other)
    base_layers, other_layers = _layers(base_image), _layers(other_image)
    shared = [layer for digest, layer in base_layers.items() if digest in other_layers]
    return ComparisonView(
        base=_compared_image(base, base_image),
        other=_compared_image(other, other_image),
        shared_layers=shared,
        base_layers=[layer for digest, layer in base_layers.items() if digest not in other_layers],
        other_layers=[layer for digest, layer in other_layers.items() if digest not in base_layers],
        shared_bytes=sum(layer.size for layer in shared),
        changes=_changes(base_image.config, other_image.config),
    )


def _existing_image(view: ManifestView) -> ImageView:
    if view.image is None:
        raise ManifestUnknown(f"{view.reference} is no image that is stored here")
    return view.image


def _compared_image(view: ManifestView, image: ImageView) -> ComparedImage:
    return ComparedImage(
        reference=view.reference,
        digest=image.digest,
        platform=image.platform,
        size=image.size,
        created=image.config.created if image.config else None,
        has_config=image.config is not None,
    )


def _layers(image: ImageView) -> dict[str, ComparedLayer]:
    """Returns the layers of an image by digest, in the order of the image. A repeated layer counts once."""
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
    """Compares one field of two configs. `base` and `other` map the names in the field, such as the variables in `env`,
    to their values. If a field has no names, such as `user`, the empty name is mapped to the field's value. Yields a
    change for each name whose values differ."""
    for name in sorted(base.keys() | other.keys()):
        if base.get(name) != other.get(name):
            yield ConfigChange(field=field, name=name, base=base.get(name), other=other.get(name))


def _single_value(words: Sequence[str] | None) -> dict[str, str]:
    """Returns the words of a command as one text, quoted for a shell, under the empty name. Returns an empty mapping if
    there is no command."""
    return {} if words is None else {"": shlex.join(words)}


def _variables(env: Sequence[str]) -> dict[str, str]:
    return {name: value for name, _, value in (entry.partition("=") for entry in env)}
