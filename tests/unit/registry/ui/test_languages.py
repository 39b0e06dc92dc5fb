"""How the language of the pages is chosen for a visitor, and whether the catalogues of translations are complete."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from babel.messages.catalog import Catalog
from babel.messages.extract import DEFAULT_KEYWORDS, extract_from_dir
from babel.messages.pofile import read_po

from registry.ui.languages import CATALOGUES, LANGUAGES, load_translations, negotiate_language
from tests.fakes.server_process import ROOT

KEYWORDS = {**DEFAULT_KEYWORDS, "hint": None, "translatable": None}
"""The names of the functions whose arguments are translated."""
FOLDERS = ("registry/ui", "registry/clients")


@pytest.mark.parametrize(
    ("chosen", "accepted", "language"),
    [
        ("", "", "en"),
        ("", "zh-CN,zh;q=0.9,en;q=0.8", "zh-Hans"),
        ("", "en-US,en;q=0.9,zh;q=0.8", "en"),
        ("", "fr, zh-TW;q=0.5", "zh-Hans"),
        ("", "zh;q=0", "en"),
        ("", "en;q=0.1, ZH-hans;q=0.2", "zh-Hans"),
        ("", "fr-FR, *;q=0.5", "en"),
        ("zh-Hans", "en", "zh-Hans"),
        ("en", "zh", "en"),
        ("fr", "zh", "zh-Hans"),
        ("", "zh;q=9, \x00;;;,,,", "en"),
        ("", "en," * 100_000 + "zh", "en"),
    ],
)
def test_the_language_of_a_visitor(chosen: str, accepted: str, language: str) -> None:
    """The language that the visitor chose is used, or else the language that the browser prefers. Values that cannot be
    parsed are ignored."""
    assert negotiate_language(chosen, accepted) == language


def translatable_texts() -> Iterator[str | tuple[str, ...]]:
    """Yields the texts in templates and code that need a translation."""
    methods = [("**.py", "python"), ("**/templates/**.html", "jinja2")]
    for folder in FOLDERS:
        for _, _, text, _, _ in extract_from_dir(
            ROOT / folder, methods, {"**.html": {"silent": "false", "trimmed": "true"}}, KEYWORDS
        ):
            yield text


def catalogue(language: str) -> Catalog:
    with CATALOGUES[language].open("rb") as file:
        return read_po(file)


@pytest.mark.parametrize("language", CATALOGUES)
def test_a_catalogue_is_complete(language: str) -> None:
    """Each text is translated. No entry is marked as fuzzy or unused. A translation has the same placeholders as its
    text."""
    messages = {message.id: message for message in catalogue(language) if message.id}
    assert set(messages) == set(translatable_texts())
    assert [message.id for message in messages.values() if message.fuzzy or not message.string] == []
    for message in messages.values():
        assert isinstance(message.id, str)
        assert isinstance(message.string, str)
        assert placeholders(message.string) == placeholders(message.id), message.id
    assert catalogue(language).obsolete == {}


def placeholders(text: str) -> list[str]:
    return sorted(re.findall(r"%\(\w+\)s|\{\w+\}", text))


def test_every_language_has_a_catalogue() -> None:
    """Every language has a catalogue, except English, in which the texts are written."""
    assert set(LANGUAGES) == {"en", *CATALOGUES}
    assert load_translations("zh-Hans").gettext("Repositories") == "仓库"
    assert load_translations("en").gettext("Repositories") == "Repositories"
    assert Path(CATALOGUES["zh-Hans"]).is_relative_to(ROOT / "registry")
