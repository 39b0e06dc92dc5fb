"""What a client asks a token for."""

from __future__ import annotations

import pytest

from registry.auth.rights.principal import CATALOG
from registry.auth.token_service.scopes import CONTENT_ACTIONS, MAX_NAMES, format_scopes, parse_scopes
from registry.request import RequestInvalid
from storage.access import Action

PULL, PUSH, DELETE = Action.PULL, Action.PUSH, Action.DELETE


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([], {}),
        (["repository:team/app:pull"], {"team/app": PULL}),
        (["repository:team/app:pull,push", "repository:a:pull"], {"team/app": PULL | PUSH, "a": PULL}),
        (["repository:team/app:pull  repository:team/app:push"], {"team/app": PULL | PUSH}),
        (["repository:app:*"], {"app": CONTENT_ACTIONS}),
        (["repository:app:delete"], {"app": DELETE}),
        (["repository(plugin):app:pull"], {"app": PULL}),
        (["registry:catalog:*"], {CATALOG: PULL}),
        (["repository:catalog:pull registry:catalog:*"], {"catalog": PULL, CATALOG: PULL}),
        (["repository:app:pull,dance"], {"app": PULL}),
    ],
)
def test_parse(values: list[str], wanted: dict[str, Action]) -> None:
    """Repeated, or parted by spaces; what is asked of one name is put together; unknown words are left out."""
    found = parse_scopes(values)
    assert found.actions == wanted
    assert not found.has_unknown_scopes


@pytest.mark.parametrize(
    "scope",
    [
        "pull",
        "repository",
        "repository:",
        "repository::pull",
        "repository:app",
        "repository:app:",
        "repository:app:admin",
        "repository:App:pull",
        "repository:../app:pull",
        "repository:host:5000/app:pull",
        "repository:registry:catalog:*",
        "registry:catalog:pull",
        "registry:other:*",
        "user:alice:pull",
        ":::",
    ],
)
def test_unreadable(scope: str) -> None:
    """What means nothing here is asked for in vain: it is not an error, and not nothing either."""
    found = parse_scopes([scope])
    assert found.actions == {}
    assert found.has_unknown_scopes
    assert found.is_any_requested
    assert not found.is_pull_only
    assert not parse_scopes([scope, "repository:app:pull"]).is_pull_only


def test_pulls_alone() -> None:
    """Pulls of any number of names are; nothing at all, a push, and the list of repositories are not."""
    assert parse_scopes(["repository:a:pull", "repository:b:pull"]).is_pull_only
    for scope in ("", "repository:a:pull,push", "repository:a:push", "repository:a:*", "registry:catalog:*"):
        assert not parse_scopes([scope]).is_pull_only


def test_bounds() -> None:
    """A request asks for so many names, and so many letters of them, that its token fits into a header."""
    assert len(parse_scopes([f"repository:a{n}:pull" for n in range(MAX_NAMES)]).actions) == MAX_NAMES
    with pytest.raises(RequestInvalid):
        parse_scopes([f"repository:a{n}:pull" for n in range(MAX_NAMES + 1)])
    with pytest.raises(RequestInvalid):
        parse_scopes([f"repository:{'a' * 200}{n}:pull" for n in range(60)])


def test_written() -> None:
    """As OAuth's answers have it."""
    granted = {"team/app": PULL | PUSH, CATALOG: PULL}
    assert format_scopes(granted) == "repository:team/app:pull,push registry:catalog:*"
    assert parse_scopes([format_scopes(granted)]).actions == granted
