"""Tests that `make book` builds the documentation site."""

from __future__ import annotations

import subprocess

from book.pages import LANGUAGES, page_names
from tests.fakes.server_process import ROOT


def test_make_book() -> None:
    """`make book` succeeds and builds each page in each language. It would fail on a warning, on a broken link, and if
    a page loaded a file from another server."""
    done = subprocess.run(["make", "book"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    site = ROOT / "build" / "book"
    expected = {f"{language}/{page}.html" for language in LANGUAGES for page in page_names()} | {"index.html"}
    assert [name for name in sorted(expected) if not (site / name).is_file()] == []
