"""Lists of a large store: what one request costs, whatever patterns say which names it may show."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from storage.metadata.connection import connect
from tests.guard.holding import MOST, watching
from tests.guard.people import grant, limit
from tests.guard.serving import Service, running
from tests.registry.driver import Answer

TEAMS, EACH = 250, 200
NAMES = sorted(f"team{team:03}/app{number:03}" for team in range(TEAMS) for number in range(EACH))
HUNDREDS = limit("*/*7", "pull")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """With an admin, 50,000 repositories, and alice, who was granted nothing yet."""
    async with running(tmp_path / "data") as started:
        with closing(connect(tmp_path / "data" / "entrepot.db")) as db, db:
            db.executemany("INSERT INTO repository (name, created, manifests) VALUES (?, 0, 1)", ((n,) for n in NAMES))
        await started.user("root", admin=True)
        await started.user("alice")
        yield started


def following(answer: Answer) -> str | None:
    """`last` of the next page."""
    path = following_path(answer)
    return parse_qs(urlsplit(path).query)["last"][0] if path else None


def following_path(answer: Answer) -> str:
    """The address of the next page; empty: there is none."""
    found = [re.fullmatch(r'<(.*)>; rel="next"', link) for link in answer.all("link")]
    return found[0][1] if found and found[0] else ""


async def walk(service: Service, login: str, n: int = 1000) -> tuple[list[str], list[str]]:
    """All repositories that the catalog shows, and the places that its links named."""
    shown: list[str] = []
    places: list[str] = []
    path = f"/v2/_catalog?n={n}"
    while True:
        answer = await service.client("GET", path, {"authorization": login})
        assert answer.status == 200, answer.body
        shown += json.loads(answer.body)["repositories"]
        place = following(answer)
        if place is None:
            return shown, places
        assert place not in places
        places.append(place)
        path = following_path(answer)


SLOW: list[Sequence[str]] = [
    [f"*/*/*0{letter}" for letter in LETTERS] + [f"*/*/*1{letter}" for letter in "abcd"],
    [f"**/{letter}" for letter in LETTERS],
    ["**a*p*p*x" + "*a" * 100],
    [f"**{number}" + "*a*p" * 60 for number in range(50)],
]


@pytest.mark.parametrize("patterns", SLOW, ids=["segments", "no prefix", "stars", "many stars"])
async def test_a_tokens_patterns_hold_nobody_up(service: Service, patterns: Sequence[str]) -> None:
    """An account limits a token of its own to patterns that match nothing, and lists repositories with it: a page ends
    when it has cost enough, with a link to go on, and the loop goes on meanwhile."""
    await grant(service.accounts, "user:alice", "**", "pull")
    login = await service.token("alice", [limit(pattern, "pull") for pattern in patterns])
    async with watching() as held:
        answer = await service.client("GET", "/v2/_catalog", {"authorization": login})
    assert (answer.status, json.loads(answer.body)) == (200, {"repositories": []})
    assert following(answer)
    assert held.longest < MOST


async def test_a_grants_patterns_hold_nobody_up(service: Service) -> None:
    """The same with what was granted to it."""
    await grant(service.accounts, "user:alice", "**/x*y*z", "pull")
    login = await service.token("alice")
    async with watching() as held:
        answer = await service.client("GET", "/v2/_catalog", {"authorization": login})
    assert (answer.status, json.loads(answer.body)) == (200, {"repositories": []})
    assert following(answer)
    assert held.longest < MOST


async def test_a_list_that_goes_on_names_nothing_hidden(service: Service) -> None:
    """A page may end at a repository that its reader may not see. The link to the next one names none: it has places
    that only this store can read, all of one length, and never the same twice. Followed, they lead through all of the
    list."""
    await grant(service.accounts, "user:alice", "**/*9*7", "pull")
    login = await service.token("alice", [limit(f"**/x{'*a*p' * 40}*{n}", "pull") for n in range(30)] + [HUNDREDS])
    expected = [name for name in NAMES if name.endswith(("/app097", "/app197"))]
    shown, places = await walk(service, login)
    assert shown == expected
    hidden = [place for place in places if place not in expected]
    assert len(hidden) > 2
    assert len({len(place) for place in hidden}) == 1
    assert len(set(hidden)) == len(hidden)
    assert not [name for name in NAMES if any(name in place or name[:7] in place for place in hidden)]
    again, others = await walk(service, login)
    assert again == expected
    assert not set(others) & set(hidden)


async def test_a_place_of_another_store(service: Service, tmp_path: Path) -> None:
    """It is refused with a sentence; so is one that was altered. A place that a client makes up of a name is good."""
    login = await service.token("alice")
    await grant(service.accounts, "user:alice", "**/none", "pull")
    first = await service.client("GET", "/v2/_catalog", {"authorization": login})
    place = following(first)
    assert place is not None
    for wrong in (place[:-4] + "AAAA", "~" + "A" * (len(place) - 1), "~" + "!" * (len(place) - 1)):
        answer = await service.client("GET", f"/v2/_catalog?last={quote(wrong)}", {"authorization": login})
        assert (answer.status, "begin" in answer.body.decode()) == (400, True), wrong
    async with running(tmp_path / "other") as other:
        other_login = await other.user("alice")
        answer = await other.client("GET", f"/v2/_catalog?last={place}", {"authorization": other_login})
        assert answer.status == 400
    await grant(service.accounts, "user:alice", "team249/**", "pull")
    answer = await service.client("GET", "/v2/_catalog?last=team249/app198", {"authorization": login})
    assert json.loads(answer.body) == {"repositories": ["team249/app199"]}
