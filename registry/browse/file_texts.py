"""Converts a file of an artifact, such as an SBOM or a signature, to text that a page can show (`file_text_of`).

A *DSSE envelope* is a JSON object with signatures and a signed `payload` in base64. A *Sigstore bundle* is a JSON
object that can contain a DSSE envelope. The payload usually is an in-toto *statement*: a JSON object that makes a claim
about an image, for example that a certain build produced the image. The statement's member `predicateType` names the
kind of claim.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from registry.browse.bounded_text import TextBudget
from registry.browse.image_config import parse_object

MAX_FILE_BYTES: Final = 64 * 1024
"""The size of the largest file whose text is shown, in bytes."""
MAX_STATEMENT_CHARACTERS: Final = 128 * 1024
"""The length of the longest statement that is shown, in characters, including the indentation."""
MAX_STATEMENT_DEPTH: Final = 32
"""Largest number of levels of nested objects and arrays in a statement that is shown. The indentation of a deeper
statement could take megabytes."""


@dataclass(frozen=True, slots=True)
class FileText:
    """The content of a file, as a page shows it.

    - `format`: "json" for a JSON object, "text" for other text, "binary" for anything else.
    - `text`: the whole file as text. None if the file is not text.
    - `statement`: the statement in the file, as indented JSON. None if the file has no statement, or if the statement
      is too long or too deeply nested to show.
    - `predicate_type`: the `predicateType` of the statement. Empty if the file or the statement has none."""

    format: Literal["json", "text", "binary"]
    text: str | None = None
    statement: str | None = None
    predicate_type: str = ""


def file_text_of(data: bytes) -> FileText:
    """Returns the texts to show for `data`, a whole file of at most `MAX_FILE_BYTES`. Call this in a thread, because it
    takes too long for the event loop."""
    text = _decode_text(data)
    if text is None:
        return FileText("binary")
    document = parse_object(data)
    if document is None:
        return FileText("text", text)
    statement = find_statement(document)
    if statement is None:
        return FileText("json", text)
    predicate_type = TextBudget().text(statement.get("predicateType"))  # cut if it is too long
    return FileText("json", text, _indented(statement), predicate_type)


def find_statement(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the statement in a DSSE envelope, or in a Sigstore bundle that contains an envelope. Returns None if
    `document` is neither, or if its payload is not a JSON object. Accepts any JSON object as a statement. Does not
    verify signatures."""
    envelope = document.get("dsseEnvelope", document)
    payload = envelope.get("payload") if isinstance(envelope, Mapping) else None
    if not isinstance(payload, str):
        return None
    try:
        data = base64.b64decode(payload)
    except ValueError:
        return None
    return parse_object(data)


def _decode_text(data: bytes) -> str | None:
    """Returns `data` as text. Returns None if `data` is not UTF-8 or contains a null character."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _indented(statement: dict[str, Any]) -> str | None:
    """Returns a statement as indented JSON. Returns None if the statement is too deeply nested or too long."""
    if _is_too_deep(statement):
        return None
    parts, size = [], 0
    for part in json.JSONEncoder(indent=2).iterencode(statement):
        size += len(part)
        if size > MAX_STATEMENT_CHARACTERS:
            return None
        parts.append(part)
    return "".join(parts)


def _is_too_deep(statement: dict[str, Any]) -> bool:
    """Returns whether a statement has more than `MAX_STATEMENT_DEPTH` levels of nested objects and arrays."""
    level: list[Any] = [statement]
    for _ in range(MAX_STATEMENT_DEPTH):
        level = [value for container in level for value in _values(container) if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def _values(container: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container
