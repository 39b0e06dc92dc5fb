"""How commands print sizes, times, lists, tables and JSON."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel

from registry.cli.output import comma_list, human_size, local_time, plural, print_json, print_rows


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
