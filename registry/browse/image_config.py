"""Parses configs of images (`parse_config`). The OCI image spec, "Image Configuration", defines their format.

The registry stores a config without checking it, so every member can be missing or have any type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from registry.browse.bounded_text import TextBudget
from registry.browse.models import ConfigView
from storage.image_times import parse_time
from storage.json_bounds import OutOfBounds, check_bounds, parse_bounded_float, parse_bounded_int
from storage.names import Digest

_SHELL: Final = re.compile(r"/bin/sh -c\s+")
"""The shell that builders write before the command of a build step."""
_NOP: Final = "#(nop)"
"""The mark that docker without BuildKit writes before the command of a build step that adds no layer."""
_BUILDKIT: Final = "# buildkit"
"""The comment that BuildKit writes after the command of a build step."""
_INSTRUCTION: Final = re.compile(
    r"(?:ADD|ARG|CMD|COPY|ENTRYPOINT|ENV|EXPOSE|HEALTHCHECK|LABEL|MAINTAINER|ONBUILD|RUN|SHELL|STOPSIGNAL|USER|VOLUME"
    r"|WORKDIR)\b"
)
"""The instruction of a Dockerfile that BuildKit writes before the command of a build step."""
_JSON: Final = json.JSONDecoder(parse_int=parse_bounded_int, parse_float=parse_bounded_float)


MAX_STEPS: Final = 1000
"""Largest number of build steps of an image, and of history entries of a config, that are shown."""


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """An entry of the history in a config, which describes a build step. `is_empty`: the step added no layer."""

    command: str
    created: datetime | None
    comment: str
    is_empty: bool


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The parts of a config that are shown. `platform`: such as `linux/arm64/v8`; empty if the config names none.
    `omitted_history`: number of history entries that `history` lacks, because there are more than `MAX_STEPS`."""

    view: ConfigView
    platform: str
    history: Sequence[HistoryEntry]
    omitted_history: int


def parse_config(digest: Digest, data: bytes) -> ImageConfig | None:
    """Parses a config. Returns None if the config is not a JSON object, or has too many values to parse. Cuts and
    leaves out texts as `TextBudget` does. `view.truncated`: whether a text outside the history was cut or left out."""
    document = parse_object(data)
    if document is None:
        return None
    budget = TextBudget()
    config = _object(document.get("config"))
    view: dict[str, Any] = {
        "user": budget.text(config.get("User")),
        "working_dir": budget.text(config.get("WorkingDir")),
        "entrypoint": budget.optional_texts(config.get("Entrypoint")),
        "cmd": budget.optional_texts(config.get("Cmd")),
        "exposed_ports": budget.names(config.get("ExposedPorts")),
        "volumes": budget.names(config.get("Volumes")),
        "stop_signal": budget.text(config.get("StopSignal")),
        "healthcheck": budget.optional_texts(_object(config.get("Healthcheck")).get("Test")),
        "env": budget.texts(config.get("Env")),
        "labels": budget.mapping(config.get("Labels")),
        "author": budget.text(document.get("author")),
    }
    created = parse_time(document.get("created"))
    history = document.get("history")
    history = history if isinstance(history, list) else []
    return ImageConfig(
        ConfigView(digest=digest, created=created, truncated=budget.is_exceeded, **view),
        platform_text(document),
        _parse_history(history[:MAX_STEPS]),
        max(0, len(history) - MAX_STEPS),
    )


def parse_object(data: bytes) -> dict[str, Any] | None:
    """Parses a JSON object. Returns None if the data is no JSON object, or has too many values to parse."""
    try:
        check_bounds(data)
        document = _JSON.decode(data.decode("utf-8", "replace"))
    except (ValueError, OutOfBounds, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def platform_text(fields: Mapping[str, object]) -> str:
    """Returns the platform in a config or in an entry of an index, such as `linux/arm64/v8`. Returns an empty text if
    the platform is missing, or has a part `unknown`. BuildKit writes `unknown/unknown` for attestations."""
    parts = [fields.get(name) for name in ("os", "architecture", "variant")]
    texts = [part[:64] for part in parts if isinstance(part, str) and part]
    return "" if "unknown" in texts else "/".join(texts)


def _parse_history(values: Sequence[object]) -> list[HistoryEntry]:
    budget = TextBudget()
    entries = []
    for value in values:
        fields = _object(value)
        entries.append(
            HistoryEntry(
                readable_command(budget.text(fields.get("created_by"))),
                parse_time(fields.get("created")),
                budget.text(fields.get("comment")),
                fields.get("empty_layer") is True,
            )
        )
    return entries


def readable_command(created_by: str) -> str:
    """Returns the command of a build step as it probably was in the Dockerfile. Removes the texts that builders add to
    the command in `created_by`, such as the shell."""
    text = created_by.strip().removesuffix(_BUILDKIT).rstrip()  # a regular expression would be slow for many spaces
    instruction = _INSTRUCTION.match(text)
    if instruction:  # BuildKit: `RUN /bin/sh -c apt-get update # buildkit`
        return f"{instruction[0]} {_SHELL.sub('', text[instruction.end() :].lstrip(), count=1)}".rstrip()
    shell = _SHELL.match(text)
    if shell is None:
        return text
    command = text[shell.end() :]
    return command.removeprefix(_NOP).strip() if command.startswith(_NOP) else f"RUN {command}"


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
