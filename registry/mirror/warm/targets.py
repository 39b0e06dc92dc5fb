"""Which images to warm, that is, to fetch into the mirror's cache before a client requests them: parses image
references and platforms, and chooses the manifests of an index.

The references come from the command line, the settings, or a file with one reference per line, in which `#` starts a
comment. Platforms are matched with the property `platform` of the entries of an index (OCI image spec, "Image Index").
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from registry.config.mirror_settings import ALL_PLATFORMS
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
"""Maps the kernel's names of architectures to those of Go, which images use. Architectures that are not listed have the
same name in both."""
_PLATFORM_PATTERN = re.compile(r"[a-z0-9]+/[a-z0-9]+(/[a-z0-9.]+)?")
_USUAL_VARIANTS = {"arm64": "v8", "arm": "v7", "amd64": "v1"}
"""For each architecture, the variant that is meant if a platform names none."""


@dataclass(frozen=True, slots=True)
class Platform:
    """A platform such as `linux/amd64` or `linux/arm/v7`."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses a platform in the form of docker's `--platform` option. Raises ValueError."""
        if not _PLATFORM_PATTERN.fullmatch(text):
            raise ValueError(f"{text!r} is not a platform like linux/amd64 or linux/arm/v7")
        return cls(*text.split("/"))

    @classmethod
    def of_machine(cls) -> Self:
        """Returns the platform with Linux and the architecture of this machine."""
        machine = platform.machine().lower()
        return cls(*f"linux/{_ARCHITECTURES.get(machine, machine)}".split("/"))

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def has_system_of(self, entry: Descriptor) -> bool:
        """Returns whether an index entry has the operating system and architecture of this platform. Ignores the
        variant."""
        properties = entry.platform or {}
        return properties.get("os") == self.os and properties.get("architecture") == self.architecture

    def has_variant_of(self, entry: Descriptor) -> bool:
        """Returns whether an index entry has the variant of this platform. If the entry or this platform names no
        variant, the usual one of the architecture is meant."""
        usual = _USUAL_VARIANTS.get(self.architecture, "")
        return ((entry.platform or {}).get("variant") or usual) == (self.variant or usual)


def parse_platforms(texts: Sequence[str]) -> list[Platform] | None:
    """Parses the platforms from the settings or the command line. Returns None, which means all platforms, if `all` is
    among them. Returns this machine's platform for an empty list. Raises ValueError."""
    if ALL_PLATFORMS in texts:
        return None
    return [Platform.parse(text) for text in texts] or [Platform.of_machine()]


def platform_name(entry: Descriptor) -> str:
    """Returns the platform of an index entry as text, such as `linux/arm/v7`; empty if the entry names none."""
    properties = entry.platform or {}
    parts = [properties.get(key) for key in ("os", "architecture", "variant")]
    return "/".join(part for part in parts if isinstance(part, str) and part not in ("", "unknown"))


def choose_manifests(
    entries: Sequence[Descriptor], platforms: Sequence[Platform]
) -> tuple[list[Descriptor], list[Platform]]:
    """Returns the entries of an index that are for one of `platforms`, in the order of the index, and the platforms for
    which there is no entry. A platform without a variant stands for the usual variant; if the index has no entry with
    that one, for all variants."""
    chosen_indices: set[int] = set()
    missing: list[Platform] = []
    for wanted in platforms:
        same_system = [index for index, entry in enumerate(entries) if wanted.has_system_of(entry)]
        same_variant = [index for index in same_system if wanted.has_variant_of(entries[index])]
        matching = same_variant or ([] if wanted.variant else same_system)
        chosen_indices.update(matching)
        if not matching:
            missing.append(wanted)
    return [entry for index, entry in enumerate(entries) if index in chosen_indices], missing


class ReferencesError(Exception):
    """The image references cannot be used. The message is one line for the user."""


def read_references(file: Path) -> list[str]:
    """Returns the image references in a file, in order and not parsed. Raises ReferencesError."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ReferencesError(f"{file}: not UTF-8 text") from None
    except OSError as error:
        raise ReferencesError(f"{file}: cannot read the references: {(error.strerror or str(error)).lower()}") from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if len(words) > 1:
            raise ReferencesError(f"{file}: line {number}: one reference a line, please: {' '.join(words)}")
        found += words
    return found


def parse_references(texts: Iterable[str]) -> list[ImageReference]:
    """Returns the parsed image references in order, without repetitions. Raises ReferencesError, whose message names
    the invalid reference."""
    found: dict[ImageReference, None] = {}
    for text in texts:
        try:
            found[parse_reference(text)] = None
        except RegistryError as error:
            raise ReferencesError(f"{text}: {error.message}") from None
    return list(found)
