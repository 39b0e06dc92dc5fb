"""References to images in a text that a user pastes into the search, such as a `docker pull` command."""

from __future__ import annotations

import pytest

from registry.admin.pasted_reference import pasted_references

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("docker pull localhost:5000/team/app:v1", [("team/app", "v1")]),
        ("docker pull reg.example.com/team/app", [("reg.example.com/team/app", None), ("team/app", None)]),
        ("sudo podman pull --quiet nginx", [("nginx", None)]),
        (f"host:5000/x/y@{DIGEST}", [("x/y", DIGEST)]),
        (f"ghcr.io/x/y:v1@{DIGEST}", [("ghcr.io/x/y", DIGEST), ("x/y", DIGEST)]),
        ("skopeo copy docker://team/app:v1 dir:/tmp/x", [("team/app", "v1")]),
        ("https://reg.example.com/team/app/", [("reg.example.com/team/app", None), ("team/app", None)]),
        ('image: "team/app:v1"', [("team/app", "v1")]),
        ("team/app", [("team/app", None)]),
        ("team app", []),
        ("Team/App", []),
        ("team/app@sha256:12", []),
        ("-v", []),
        ("", []),
    ],
)
def test_references_in_a_pasted_text(text: str, expected: list[tuple[str, str | None]]) -> None:
    """All references that the text can mean are found."""
    assert [(found.repository, found.reference) for found in pasted_references(text)] == expected
