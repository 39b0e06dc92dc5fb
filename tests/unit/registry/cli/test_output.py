"""How commands print sizes, times, lists, tables and JSON."""

from __future__ import annotations

import json
import tomllib

import pytest
import typer
from pydantic import BaseModel
from rich.text import Text

from registry.cli.options import fail
from registry.cli.output import (
    comma_list,
    human_size,
    local_time,
    new_table,
    plain_console,
    plural,
    print_json,
    print_json_value,
    print_line,
    print_rows,
    print_text,
    progress_console,
)
from registry.cli.settings_text import toml_value
from storage.human_text import MAX_SHOWN_TIME

HOSTILE = "a\x1b]52;c;cm0=\x07b\x9b2J\x7fc\u202ed\ud800\n\re"
"""Text with an escape sequence that writes to the clipboard, one that clears the screen (with the C1 character CSI),
DEL, a change of the writing direction, half of a surrogate pair, and the start of another line."""


class Row(BaseModel):
    name: str


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (1 << 60, "1048576.0 TiB")],
)
def test_sizes(count: int, text: str) -> None:
    """Sizes are written in binary units with one digit after the point. Sizes in bytes have no point."""
    assert human_size(count) == text


def test_plurals_lists_and_times() -> None:
    """A count of 1 has a noun in the singular. An empty list is written as a dash. A missing time is written as a dash,
    or as the text that the caller gives."""
    assert [plural(count, "blob") for count in (0, 1, 2)] == ["0 blobs", "1 blob", "2 blobs"]
    assert (comma_list(["a", "b"]), comma_list([])) == ("a, b", "-")
    assert (local_time(None), local_time(None, "never")) == ("-", "never")


def test_times_are_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are written with minutes, in the time zone of the machine."""
    import time

    monkeypatch.setenv("TZ", "UTC-2")  # POSIX counts hours to the west, so this zone is two hours ahead of UTC
    time.tzset()
    try:
        assert local_time(0.0) == "1970-01-01 02:00"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_print_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are printed as a table on stdout. Control characters are replaced, and markup is not interpreted. If there
    are no rows, a sentence on stderr says so."""
    print_rows(("name", "note"), [("app", "\x1b[2J"), ("[bold]", "")], "nothing yet")
    printed = capsys.readouterr()
    assert [line.split() for line in printed.out.splitlines() if "─" not in line] == [
        ["name", "note"], ["app", "?[2J"], ["[bold]"],
    ]  # fmt: skip
    print_rows(("name",), [], "nothing yet; add one")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "entrepot: nothing yet; add one\n")


def test_print_json(capsys: pytest.CaptureFixture[str]) -> None:
    """One model is printed as a JSON object, and a list of models as an array."""
    print_json(Row(name="é"))
    assert json.loads(capsys.readouterr().out) == {"name": "é"}
    print_json([Row(name="a"), Row(name="b")])
    assert json.loads(capsys.readouterr().out) == [{"name": "a"}, {"name": "b"}]


def test_lines_and_texts_have_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """A control character in printed text is replaced by `?`, on stdout and on stderr. A text of several lines keeps
    its line breaks and tabs."""
    print_line(HOSTILE)
    print_line(HOSTILE, err=True)
    assert list(capsys.readouterr()) == ["a?]52;c;cm0=?b?2J?c?d???e\n"] * 2
    print_text("é\t中\n" + HOSTILE, end="")
    assert capsys.readouterr().out == "é\t中\na?]52;c;cm0=?b?2J?c?d?\n?e"


def test_error_is_one_line_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """The error of a command is one line without control characters, whatever is in the name of a file or an image."""
    with pytest.raises(typer.Exit):
        fail(HOSTILE)
    assert capsys.readouterr().err == "entrepot: a?]52;c;cm0=?b?2J?c?d???e\n"


def test_consoles_print_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """Tables and texts of rich, and the bars that show progress, have no control characters of the content."""
    table = new_table("name")
    table.add_row(Text(HOSTILE, "bold"))
    for console in (plain_console(), progress_console()):
        console.print(table)
        console.print(Text(HOSTILE), soft_wrap=True)
    for printed in capsys.readouterr():
        assert printed.count("a?]52;c;cm0=") == 2
        assert printed.replace("\n", "").isprintable()


def test_json_has_escapes_for_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON has escapes in place of control characters, also of those that JSON allows in strings. Its values are
    unchanged."""
    values = {"text": HOSTILE, "\x9b": "é中\U000e0001"}
    print_json_value(values, indent=2)
    print_json_value(values)
    print_json(Row(name="\x9b\x7f"))
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable()
    assert "é中" in printed
    indented, line, row = json.loads("[" + printed.replace("}\n{", "},{") + "]")
    assert indented == line == values
    assert row == {"name": "\x9b\x7f"}


def test_settings_in_toml_have_escapes_for_control_characters() -> None:
    """A setting in TOML has escapes in place of control characters, and the same value."""
    value = HOSTILE.replace("\ud800", "") + "\U000e0001 é中"
    text = toml_value({value: [value]})
    assert text.isprintable()
    assert tomllib.loads(f"x = {text}") == {"x": {value: [value]}}


def test_times_after_the_year_9999() -> None:
    """A time after the year 9999 is shown as the end of that year, because it may be too large for the platform."""
    assert local_time(8.64e16) == local_time(MAX_SHOWN_TIME)
    assert local_time(None, "never") == "never"
