"""The scopes that a client requests for a bearer token: how they are parsed and written."""

from __future__ import annotations

import pytest

from registry.auth.rights.principal import CATALOG
from registry.auth.token_service.scopes import CONTENT_ACTIONS, MAX_NAMES, MAX_SCOPES, format_scopes, parse_scopes
from registry.request import RequestInvalid
from storage.access import Action
from tests.fakes.instruction_count import count_instructions

PULL, PUSH, DELETE = Action.PULL, Action.PUSH, Action.DELETE


@pytest.mark.parametrize(
    ("values", "expected"),
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
def test_scopes_are_parsed(values: list[str], expected: dict[str, Action]) -> None:
    """A client can send scopes as repeated parameters, or in one parameter with spaces between them. The actions on the
    same name are united. Unknown actions are left out."""
    scopes = parse_scopes(values)
    assert scopes.actions == expected
    assert not scopes.has_unknown_scopes


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
def test_unknown_scopes_grant_nothing(scope: str) -> None:
    """An unknown scope grants nothing and raises no error. Still, the request does not count as one without scopes, nor
    as one for pulls only."""
    scopes = parse_scopes([scope])
    assert scopes.actions == {}
    assert scopes.has_unknown_scopes
    assert scopes.is_any_requested
    assert not scopes.is_pull_only
    assert not parse_scopes([scope, "repository:app:pull"]).is_pull_only


def test_requests_for_pulls_only() -> None:
    """A request with scopes for pulls from any number of repositories is for pulls only. A request without scopes, for
    a push, or for the list of repositories is not."""
    assert parse_scopes(["repository:a:pull", "repository:b:pull"]).is_pull_only
    for scope in ("", "repository:a:pull,push", "repository:a:push", "repository:a:*", "registry:catalog:*"):
        assert not parse_scopes([scope]).is_pull_only


def test_a_request_has_a_largest_number_of_names() -> None:
    """A request may name a limited number of repositories with a limited total length, so that its token fits into a
    header."""
    assert len(parse_scopes([f"repository:a{n}:pull" for n in range(MAX_NAMES)]).actions) == MAX_NAMES
    with pytest.raises(RequestInvalid):
        parse_scopes([f"repository:a{n}:pull" for n in range(MAX_NAMES + 1)])
    with pytest.raises(RequestInvalid):
        parse_scopes([f"repository:{'a' * 200}{n}:pull" for n in range(60)])


def test_a_request_has_a_largest_number_of_scopes() -> None:
    """A request may have a limited number of scopes. Repeated and unknown scopes count, too, in one parameter and in
    several."""
    for scope in ("repository:app:pull", "user:alice:pull"):
        parse_scopes([" ".join([scope] * MAX_SCOPES)])
        for values in ([" ".join([scope] * (MAX_SCOPES + 1))], [scope] * (MAX_SCOPES + 1)):
            with pytest.raises(RequestInvalid, match=f"at most {MAX_SCOPES} scopes"):
                parse_scopes(values)


@pytest.mark.parametrize("word", ["", "pull", "dance"])
def test_cost_of_a_scope_does_not_depend_on_its_number_of_words(word: str) -> None:
    """A scope that repeats an action, or has many commas, costs as much as a short one. Otherwise one form of 64 KiB
    would block the event loop for more than 100 ms."""
    totals = []
    for words in (2, 20_000):
        with count_instructions() as count:
            parse_scopes([f"repository:app:{','.join([word] * words)}"])
        totals.append(count.total)
    assert totals[0] == totals[1]


def test_scopes_are_written() -> None:
    """The scopes are written in the format of OAuth's responses, which can be parsed again."""
    granted = {"team/app": PULL | PUSH, CATALOG: PULL}
    assert format_scopes(granted) == "repository:team/app:pull,push registry:catalog:*"
    assert parse_scopes([format_scopes(granted)]).actions == granted
