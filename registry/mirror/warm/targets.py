"""What to warm: the references, from the command line, settings and files, and the platforms.

A file has one reference per line; `#` starts a comment. Platforms are matched as in the OCI image spec, "Image Index",
`platform`.
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
"""Go's names of architectures, which images use, by the kernel's names. Other names are the same in both."""
_FORM = re.compile(r"[a-z0-9]+/[a-z0-9]+(/[a-z0-9.]+)?")
_USUAL_VARIANTS = {"arm64": "v8", "arm": "v7", "amd64": "v1"}
"""The variant that is meant where none is given."""


@dataclass(frozen=True, slots=True)
class Platform:
    """A platform such as `linux/amd64` or `linux/arm/v7`."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses a platform as docker's `--platform` writes it. Raises ValueError."""
        if not _FORM.fullmatch(text):
            raise ValueError(f"{text!r} is not a platform like linux/amd64 or linux/arm/v7")
        return cls(*text.split("/"))

    @classmethod
    def of_machine(cls) -> Self:
        """Returns Linux on this machine's processor."""
        machine = platform.machine().lower()
        return cls(*f"linux/{_ARCHITECTURES.get(machine, machine)}".split("/"))

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def fits(self, entry: Descriptor) -> bool:
        """Returns whether an index entry is for this platform, regardless of the variant."""
        about = entry.platform or {}
        return about.get("os") == self.os and about.get("architecture") == self.architecture

    def is_variant_of(self, entry: Descriptor) -> bool:
        """Returns whether the entry has this platform's variant. A missing variant means the usual one."""
        usual = _USUAL_VARIANTS.get(self.architecture, "")
        return ((entry.platform or {}).get("variant") or usual) == (self.variant or usual)


def parse_platforms(texts: Sequence[str]) -> list[Platform] | None:
    """Parses the platforms of settings and flags. `all` returns None; an empty list returns this machine's platform.
    Raises ValueError."""
    if ALL_PLATFORMS in texts:
        return None
    return [Platform.parse(text) for text in texts] or [Platform.of_machine()]


def platform_name(entry: Descriptor) -> str:
    """Returns the entry's platform as text; empty if it names none."""
    about = entry.platform or {}
    parts = [about.get(key) for key in ("os", "architecture", "variant")]
    return "/".join(part for part in parts if isinstance(part, str) and part not in ("", "unknown"))


def choose_manifests(
    entries: Sequence[Descriptor], platforms: Sequence[Platform]
) -> tuple[list[Descriptor], list[Platform]]:
    """Returns the entries for `platforms`, in the index's order, and the platforms without an entry. A platform without
    a variant matches the usual variant, or all variants if the index lacks that one."""
    chosen: set[int] = set()
    missing: list[Platform] = []
    for wanted in platforms:
        fitting = [place for place, entry in enumerate(entries) if wanted.fits(entry)]
        exact = [place for place in fitting if wanted.is_variant_of(entries[place])]
        found = exact or ([] if wanted.variant else fitting)
        chosen.update(found)
        if not found:
            missing.append(wanted)
    return [entry for place, entry in enumerate(entries) if place in chosen], missing


class ReferencesError(Exception):
    """The references cannot be used. The text is one line for the user."""


def read_references(file: Path) -> list[str]:
    """Returns the references in `file`, in order. Raises ReferencesError."""
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
    """Returns each reference once, in order. Raises ReferencesError, which names the invalid one."""
    found: dict[ImageReference, None] = {}
    for text in texts:
        try:
            found[parse_reference(text)] = None
        except RegistryError as error:
            raise ReferencesError(f"{text}: {error.message}") from None
    return list(found)
