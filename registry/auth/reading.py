"""Rights as people write them, on the command line and to the API. All raise AccountInvalid, in words for a person."""

from __future__ import annotations

from storage.access import AccountInvalid, Action, Limit
from storage.names import shown
from storage.patterns import NamePattern

LONGEST_NOTE = 200


def read_pattern(text: str) -> NamePattern:
    try:
        return NamePattern(text)
    except ValueError as error:
        raise AccountInvalid(str(error)) from None


def read_actions(text: str) -> Action:
    """`pull,push`; `*` is all of them."""
    try:
        return Action.parse(text)
    except ValueError as error:
        raise AccountInvalid(str(error)) from None


def read_limit(text: str) -> Limit:
    """`team/**:pull,push`."""
    pattern, colon, actions = text.partition(":")
    if not colon:
        raise AccountInvalid(f"{shown(text)} does not say what is allowed; write it like team/**:pull,push")
    return Limit(read_pattern(pattern), read_actions(actions))


def check_note(note: str) -> None:
    if len(note) > LONGEST_NOTE or not (note.isprintable() or not note):
        raise AccountInvalid(f"a note is one line of at most {LONGEST_NOTE} characters")
