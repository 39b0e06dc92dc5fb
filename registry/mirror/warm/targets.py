"""Finds out which images to *warm*. To warm an image is to fetch it into the mirror's cache before a client requests
it. This module parses image references and platforms, and chooses the manifests of an index.

The references come from the command line, the settings or a file. The file has one reference per line; `#` starts a
comment. An entry of an index states its platform in the property `platform` (OCI image spec, "Image Index").
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from registry.config.mirror_settings import ALL_PLATFORMS
from registry.small_files import read_small_text
from storage.content import Descriptor
from storage.errors import RegistryError
from storage.names import ImageReference, parse_reference

_ARCHITECTURES = {
    "x86_64": "amd64",
    "amd64": "amd64",
    "i386": "386",
    "i686": "386",
    "aarch64": "arm64",
    "arm64": "arm64",
    "armv7l": "arm/v7",
    "armv6l": "arm/v6",
}
"""Maps the kernel's name of an architecture to Go's name, which images use. Other architectures have the same name in
the kernel and in Go."""
_PLATFORM_PATTERN = re.compile(r"[a-z0-9]+/[a-z0-9]+(/[a-z0-9.]+)?")
"""Operating system, architecture, and optionally the variant of the architecture."""
_USUAL_VARIANTS = {"arm64": "v8", "arm": "v7", "amd64": "v1"}
"""For each architecture, the variant that is usually meant if a platform states no variant."""


@dataclass(frozen=True, slots=True)
class Platform:
    """A platform such as `linux/amd64` or `linux/arm/v7`."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses a platform in the form of docker's option `--platform`. Raises ValueError."""
        if not _PLATFORM_PATTERN.fullmatch(text):
            raise ValueError(f"{text!r} is not a platform like linux/amd64 or linux/arm/v7")
        return cls(*text.split("/"))

    @classmethod
    def of_machine(cls) -> Self:
        """Returns the platform of Linux on the architecture of this machine."""
        machine = platform.machine().lower()
        return cls(*f"linux/{_ARCHITECTURES.get(machine, machine)}".split("/"))

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def matches_system(self, entry: Descriptor) -> bool:
        """Returns whether this platform and an index entry have the same operating system and architecture."""
        properties = entry.platform or {}
        return properties.get("os") == self.os and properties.get("architecture") == self.architecture

    def matches_variant(self, entry: Descriptor) -> bool:
        """Returns whether this platform and an index entry of the same architecture have the same variant. If the
        platform or the entry states no variant, uses the usual variant of the architecture."""
        usual = _USUAL_VARIANTS.get(self.architecture, "")
        return ((entry.platform or {}).get("variant") or usual) == (self.variant or usual)


def parse_platforms(texts: Sequence[str]) -> list[Platform] | None:
    """Parses the platforms from the settings or the command line. Returns None, which stands for all platforms, if
    `all` is among them. Returns the platform of this machine if `texts` is empty. Raises ValueError."""
    if ALL_PLATFORMS in texts:
        return None
    return [Platform.parse(text) for text in texts] or [Platform.of_machine()]


def platform_name(entry: Descriptor) -> str:
    """Returns the platform of an index entry as text, such as `linux/arm/v7`. Leaves out missing parts and the part
    `unknown`. If no part remains, the text is empty."""
    properties = entry.platform or {}
    parts = [properties.get(key) for key in ("os", "architecture", "variant")]
    return "/".join(part for part in parts if isinstance(part, str) and part not in ("", "unknown"))


def choose_manifests(
    entries: Sequence[Descriptor], platforms: Sequence[Platform]
) -> tuple[list[Descriptor], list[Platform]]:
    """Returns two lists: the entries of an index that are for one of `platforms`, in the order of the index, and the
    platforms for which the index has no entry. For a platform without a variant, chooses the entries with the usual
    variant. If the index has no such entries, chooses the entries with any variant."""
    chosen_positions: set[int] = set()
    missing: list[Platform] = []
    for requested in platforms:
        same_system = [position for position, entry in enumerate(entries) if requested.matches_system(entry)]
        same_variant = [position for position in same_system if requested.matches_variant(entries[position])]
        matching = same_variant or ([] if requested.variant else same_system)
        chosen_positions.update(matching)
        if not matching:
            missing.append(requested)
    return [entry for position, entry in enumerate(entries) if position in chosen_positions], missing


class ReferencesError(Exception):
    """The image references cannot be read or parsed. The message is one line for the user."""


def read_references(file: Path) -> list[str]:
    """Returns the texts of the image references in a file, in the order of the lines. Raises ReferencesError."""
    try:
        text = read_small_text(file)
    except UnicodeDecodeError:
        raise ReferencesError(f"{file}: not UTF-8 text") from None
    except OSError as error:
        raise ReferencesError(f"{file}: cannot read the references: {(error.strerror or str(error)).lower()}") from None
    references = []
    for line_number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if len(words) > 1:
            raise ReferencesError(f"{file}: line {line_number} has more than one reference: {' '.join(words)}")
        references += words
    return references


def parse_references(texts: Iterable[str]) -> list[ImageReference]:
    """Parses image references. Returns them in the order of `texts`, without duplicates. Raises ReferencesError, whose
    message names the invalid reference."""
    references: dict[ImageReference, None] = {}
    for text in texts:
        try:
            references[parse_reference(text)] = None
        except RegistryError as error:
            raise ReferencesError(f"{text}: {error.message}") from None
    return list(references)
