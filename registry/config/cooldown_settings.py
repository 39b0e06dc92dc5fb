"""The types of the settings `cooldown_tags` and `cooldown_exempt` of an `[[upstream]]`.

A *cooldown* is a duration. When a tag at the upstream gets a new digest, the tag must keep this digest for the duration
of the cooldown. Pulls of the tag get this digest only after that.

The functions are pydantic validators: they return the value unchanged, or raise ValueError if it is not valid.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from storage.patterns import NamePattern

_TAG_PATTERN_SYNTAX = re.compile(r"[a-zA-Z0-9._*?\[\]!-]+")


def check_tag_pattern(value: str) -> str:
    """Checks a pattern of tags."""
    if not _TAG_PATTERN_SYNTAX.fullmatch(value):
        raise ValueError(f"{value!r} is not a pattern of tags, such as v* or *-nightly")
    return value


def _check_exemption(value: str) -> str:
    repository_pattern, colon, tag_pattern = value.partition(":")
    if colon and not tag_pattern:
        raise ValueError(f"{value!r} has no pattern of tags after the colon; write it like team/app:nightly-*")
    try:
        NamePattern(repository_pattern)
        check_tag_pattern(tag_pattern or "*")
    except ValueError as error:
        raise ValueError(f"{error}; an exemption is written like library/**, team/app:nightly-* or **:edge") from None
    return value


TagPattern = Annotated[str, AfterValidator(check_tag_pattern)]
"""A pattern of tags, such as `v*`."""
CooldownExemption = Annotated[str, AfterValidator(_check_exemption)]
"""An exemption from the cooldown: a pattern of repository names at the upstream, such as `library/**`. A colon and a
pattern of tags may follow, as in `team/app:nightly-*`."""
