"""Tests of `/api/v1/imports`: an admin cannot make the server connect to other machines than the upstreams of the
settings, or read other directories than those of registries."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.admin_site import AdminSite, code_of


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "https://old.example.com", "ftp://old.example.com"])
def test_only_upstreams_of_the_settings(site: AdminSite, url: str) -> None:
    """An import from a URL that is not an endpoint of an upstream in the settings is refused, and no job is added."""
    answer = site.call("POST", "/imports/remote", {"url": url})
    assert (answer.status_code, code_of(answer)) == (400, "IMPORT_INVALID")
    assert f"{url} is not an endpoint of an [[upstream]] in the settings" in answer.text
    assert site.call_ok("GET", "/jobs", kind="import-remote")["items"] == []


def test_only_directories_of_registries(site: AdminSite, tmp_path: Path) -> None:
    """An import from a directory that is not the data directory of a registry is refused. The error contains nothing of
    the directory's content."""
    (tmp_path / "secret").write_text("a secret text")
    paths = (str(tmp_path), str(tmp_path / "secret"), str(tmp_path / "none"), "relative", "/null\0", "/" + "x" * 300)
    for path in paths:
        answer = site.call("POST", "/imports/directory", {"path": path})
        assert (answer.status_code, code_of(answer)) == (400, "IMPORT_INVALID")
        assert "a secret" not in answer.text
    assert site.call_ok("GET", "/jobs", kind="import-registry")["items"] == []
