"""Lists of a large store. The work for one request is bounded, whatever name patterns the account or its token has, so
that no request blocks the event loop."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import httpx2
import pytest

from storage.access import AccountInvalid
from storage.metadata.sqlite.access.grant_table import MAX_GRANTS_PER_SUBJECT
from storage.metadata.sqlite.database import connect
from tests.fakes.app_in_process import AppInProcess, running_app
from tests.fakes.asgi_client import AsgiAnswer
from tests.fakes.loop_hold import MAX_SECONDS, watch_loop
from tests.fakes.store_accounts import add_grant, limit

pytestmark = pytest.mark.slow

TEAMS, REPOSITORIES_PER_TEAM = 250, 200
NAMES = sorted(f"team{team:03}/app{number:03}" for team in range(TEAMS) for number in range(REPOSITORIES_PER_TEAM))
ENDING_IN_7 = limit("*/*7", "pull")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[AppInProcess]:
    """Yields a registry with 50,000 repositories, an admin, and the account alice without grants."""
    async with running_app(tmp_path / "data") as started:
        with closing(connect(tmp_path / "data" / "entrepot.db")) as db, db:
            db.executemany("INSERT INTO repository (name, created, manifests) VALUES (?, 0, 1)", ((n,) for n in NAMES))
        await started.user("root", admin=True)
        await started.user("alice")
        yield started


@asynccontextmanager
async def api_client(service: AppInProcess) -> AsyncIterator[httpx2.AsyncClient]:
    """Yields a client for paths outside `/v2`."""
    transport = httpx2.ASGITransport(app=service.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://registry.test") as client:
        yield client


def next_position(answer: AsgiAnswer) -> str | None:
    """Returns the parameter `last` in the link to the next page: the position at which the next page begins."""
    path = next_path(answer)
    return parse_qs(urlsplit(path).query)["last"][0] if path else None


def next_path(answer: AsgiAnswer) -> str:
    """Returns the path of the next page; empty if there is none."""
    matches = [re.fullmatch(r'<(.*)>; rel="next"', link) for link in answer.all("link")]
    return matches[0][1] if matches and matches[0] else ""


async def walk(service: AppInProcess, login: str, n: int = 1000) -> tuple[list[str], list[str]]:
    """Returns all repositories that the catalog lists, and the positions in the links between its pages."""
    listed: list[str] = []
    positions: list[str] = []
    path = f"/v2/_catalog?n={n}"
    while True:
        answer = await service.client("GET", path, {"authorization": login})
        assert answer.status == 200, answer.body
        listed += json.loads(answer.body)["repositories"]
        position = next_position(answer)
        if position is None:
            return listed, positions
        assert position not in positions
        positions.append(position)
        path = next_path(answer)


SLOW_PATTERNS: list[Sequence[str]] = [
    [f"*/*/*0{letter}" for letter in LETTERS] + [f"*/*/*1{letter}" for letter in "abcd"],
    [f"**/{letter}" for letter in LETTERS],
    ["**a*p*p*x" + "*a" * 100],
    [f"**{number}" + "*a*p" * 60 for number in range(50)],
]
"""Lists of patterns that take long to compare with many names."""


@pytest.mark.parametrize("patterns", SLOW_PATTERNS, ids=["segments", "no prefix", "stars", "many stars"])
async def test_a_tokens_patterns_do_not_block_the_event_loop(service: AppInProcess, patterns: Sequence[str]) -> None:
    """An older version allowed to limit a token to complex patterns. Such a token may still exist, and its patterns
    match nothing now. Even with this token, a page of the catalog ends after a bounded amount of work, with a link to
    the next page. The event loop is not blocked."""
    await add_grant(service.accounts, "user:alice", "**", "pull")
    login = await service.token("alice", [limit(pattern, "pull") for pattern in patterns])
    async with watch_loop() as loop_delay:
        answer = await service.client("GET", "/v2/_catalog", {"authorization": login})
    assert (answer.status, json.loads(answer.body)) == (200, {"repositories": []})
    assert next_position(answer)
    assert loop_delay.longest < MAX_SECONDS


async def test_a_grants_patterns_do_not_block_the_event_loop(service: AppInProcess) -> None:
    """A page of the catalog also ends after a bounded amount of work if a grant has a complex pattern."""
    await add_grant(service.accounts, "user:alice", "**/x*y*z", "pull")
    login = await service.token("alice")
    async with watch_loop() as loop_delay:
        answer = await service.client("GET", "/v2/_catalog", {"authorization": login})
    assert (answer.status, json.loads(answer.body)) == (200, {"repositories": []})
    assert next_position(answer)
    assert loop_delay.longest < MAX_SECONDS


async def test_links_to_further_pages_hide_names(service: AppInProcess) -> None:
    """A page may end at a repository that the client may not see. The link to the next page then has an encrypted
    position. All encrypted positions have the same length, and each is different. The links lead through the whole
    list."""
    await add_grant(service.accounts, "user:alice", "**/*9*7", "pull")
    login = await service.token("alice", [limit(f"**/x{'*a*p' * 40}*{n}", "pull") for n in range(30)] + [ENDING_IN_7])
    expected = [name for name in NAMES if name.endswith(("/app097", "/app197"))]
    listed, positions = await walk(service, login)
    assert listed == expected
    encrypted = [position for position in positions if position not in expected]
    assert len(encrypted) > 2
    assert len({len(position) for position in encrypted}) == 1
    assert len(set(encrypted)) == len(encrypted)
    assert not [name for name in NAMES if any(name in position or name[:7] in position for position in encrypted)]
    listed_again, other_positions = await walk(service, login)
    assert listed_again == expected
    assert not set(other_positions) & set(encrypted)


async def test_a_foreign_position_is_refused(service: AppInProcess, tmp_path: Path) -> None:
    """An encrypted position from another store or another list is refused, and so is a position that was altered. A
    client may also send any name as the position."""
    login = await service.token("alice")
    await add_grant(service.accounts, "user:alice", "**/none", "pull")
    first_page = await service.client("GET", "/v2/_catalog", {"authorization": login})
    position = next_position(first_page)
    assert position is not None
    for wrong_position in (position[:-4] + "AAAA", "~" + "A" * (len(position) - 1), "~" + "!" * (len(position) - 1)):
        answer = await service.client("GET", f"/v2/_catalog?last={quote(wrong_position)}", {"authorization": login})
        assert (answer.status, "request the list from its start" in answer.body.decode()) == (400, True), wrong_position
    async with api_client(service) as client:
        elsewhere = await client.get(f"/api/v1/grants?after={position}", headers={"authorization": login})
        assert (elsewhere.status_code, "this registry has not issued the cursor" in elsewhere.text) == (400, True), (
            elsewhere.text
        )
    async with running_app(tmp_path / "other") as other:
        other_login = await other.user("alice")
        answer = await other.client("GET", f"/v2/_catalog?last={position}", {"authorization": other_login})
        assert answer.status == 400
    await add_grant(service.accounts, "user:alice", "team249/**", "pull")
    answer = await service.client("GET", "/v2/_catalog?last=team249/app198", {"authorization": login})
    assert json.loads(answer.body) == {"repositories": ["team249/app199"]}


def put_grants(service: AppInProcess, kind: str, name: str, patterns: Iterable[str]) -> None:
    """Writes grants directly into the database, because the API would need minutes for so many."""
    with closing(connect(service.data / "entrepot.db")) as db, db:
        rows = ((kind, name, pattern, 1 + number % 15) for number, pattern in enumerate(patterns))
        db.executemany("INSERT INTO access_grant (kind, name, pattern, actions) VALUES (?, ?, ?, ?)", rows)
        db.execute("UPDATE access SET epoch = epoch + 1")


async def test_the_largest_number_of_grants_does_not_block_the_event_loop(service: AppInProcess) -> None:
    """The store has the largest number of grants to an account, to all accounts and to everyone, and the account is in
    hundreds of groups. Reads, lists, tokens for a hundred names, and checks of the right to grant do not block the
    event loop."""
    login = await service.token("alice", None)
    limits = [limit(f"**{number}" + "*a*p" * 60, "pull") for number in range(50)]
    limited = await service.token("alice", limits)
    put_grants(
        service, "user", "alice", (f"team{n}/x*y{n}" if n % 2 else f"**/{n}" for n in range(MAX_GRANTS_PER_SUBJECT))
    )
    put_grants(service, "authenticated", "", (f"team{n}/*" for n in range(MAX_GRANTS_PER_SUBJECT)))
    put_grants(service, "everyone", "", (f"public{n}/**" for n in range(MAX_GRANTS_PER_SUBJECT)))
    with closing(connect(service.data / "entrepot.db")) as db, db:
        groups = [f"group{number}" for number in range(300)]
        db.executemany("INSERT INTO account_group (name, created) VALUES (?, 0)", ((name,) for name in groups))
        db.executemany("INSERT INTO group_member (name, member) VALUES (?, 'alice')", ((name,) for name in groups))
    scopes = "&".join(f"scope=repository:{'a/' * 30}x{number}:pull,push" for number in range(100))
    body = {"subject": "user:bob", "pattern": "team1/" + "*a*b" * 50, "actions": ["pull"]}
    for authorization in (login, limited):
        headers = {"authorization": authorization, "content-type": "application/json"}
        for method, path, status in (
            ("GET", "/v2/team1/app/tags/list", 404),
            ("GET", f"/v2/{'a/' * 120}a/manifests/latest", 404),
            ("GET", "/v2/_catalog", 200),
            ("GET", f"/token?service=entrepot&{scopes}", 200),
            ("GET", "/api/v1/me", 200),
            ("GET", "/api/v1/grants?limit=1000", 200),
            ("GET", "/api/v1/grants?for=alice&limit=1000", 200),
            ("PUT", "/api/v1/grants", 403),
        ):
            async with api_client(service) as client, watch_loop() as loop_delay:
                content = json.dumps(body) if method == "PUT" else None
                answer = await client.request(method, path, headers=headers, content=content)
            # A limited token may also get a 401, because another token could have the right.
            statuses = (status, 401) if status == 404 and authorization is limited else (status,)
            assert answer.status_code in statuses, (path, answer.text)
            assert loop_delay.longest < 2 * MAX_SECONDS, path


async def test_lists_of_the_management_api_do_not_block_the_event_loop(service: AppInProcess) -> None:
    """Large lists of the management API (`/api/v1`) are complete over all their pages, and do not block the event loop.
    They are: grants, groups with hundreds of members, accounts in a hundred groups, tokens with fifty limits, and audit
    queries with few or no matches."""
    root = await service.token("root")
    put_grants(service, "user", "alice", (f"team{number}/*" for number in range(2500)))
    limits = json.dumps([(f"**/{'a*' * 100}{number}", 15) for number in range(50)])
    with closing(connect(service.data / "entrepot.db")) as db, db:
        groups = [f"group{number}" for number in range(100)]
        db.executemany("INSERT INTO account_group (name, created) VALUES (?, 0)", ((name,) for name in groups))
        members = ((name, f"user{number}") for name in groups for number in range(300))
        db.executemany("INSERT INTO group_member (name, member) VALUES (?, ?)", members)
        accounts = ((f"user{number}",) for number in range(300))
        db.executemany("INSERT INTO account VALUES (?, 'user', NULL, 1, 0, 1, 0, '')", accounts)
        tokens = ((f"t{number:03}", limits) for number in range(100))
        db.executemany("INSERT INTO api_token VALUES (?, 'alice', 'personal', '', x'00', 0, NULL, ?, NULL)", tokens)
        lines = ((float(number), f"actor{number % 7}", f"team/app{number % 100}") for number in range(100_000))
        db.executemany("INSERT INTO audit VALUES (NULL, ?, ?, 'manifest.put', ?, '', 'ok', '', '', '', NULL, 1)", lines)
    for path, key, count in (
        ("grants?limit=1000", "pattern", 2500),
        ("groups?limit=1000", "name", 100),
        ("users?limit=1000", "name", 302),
        ("tokens?limit=1000", "id", None),
        ("audit?limit=1000&actor=nobody&outcome=ok", "id", 0),
        ("audit?limit=1000&actor=actor3&target=none", "id", 0),
        ("audit?limit=10&actor=actor3&target=team/app5", "id", None),
    ):
        listed: list[str] = []
        after = ""
        while True:
            async with api_client(service) as client, watch_loop() as loop_delay:
                query = f"{path}&after={quote(after)}" if after else path
                answer = await client.get(f"/api/v1/{query}", headers={"authorization": root})
            assert answer.status_code == 200, answer.text
            assert loop_delay.longest < 2 * MAX_SECONDS, path
            listed += [item[key] for item in answer.json()["items"]]
            after = answer.json()["next"] or ""
            if not after:
                break
        assert len(listed) == len(set(listed)), path
        assert count is None or len(listed) == count, path
    assert loop_delay.longest < 2 * MAX_SECONDS


async def test_an_account_sees_only_the_grants_that_it_may_give(service: AppInProcess) -> None:
    """An account with the action `admin` on a pattern sees only the grants below this pattern. No position in the links
    between pages names another grant."""
    login = await service.token("alice")
    await add_grant(service.accounts, "user:alice", "team/**", "admin")
    put_grants(
        service, "user", "bob", (f"{'team' if number % 400 == 0 else 'hidden'}/x{number}" for number in range(4000))
    )
    patterns, positions, after = [], [], ""
    while True:
        async with api_client(service) as client, watch_loop() as loop_delay:
            path = "/api/v1/grants?limit=3" + (f"&after={quote(after)}" if after else "")
            answer = await client.get(path, headers={"authorization": login})
        assert answer.status_code == 200, answer.text
        assert loop_delay.longest < 2 * MAX_SECONDS
        patterns += [item["pattern"] for item in answer.json()["items"]]
        after = answer.json()["next"] or ""
        if not after:
            break
        positions.append(after)
    assert sorted(patterns) == sorted(["team/**", *(f"team/x{number}" for number in range(0, 4000, 400))])
    assert not [position for position in positions if "hidden" in position]


async def test_the_grants_of_a_subject_are_limited(service: AppInProcess) -> None:
    """A subject (an account, all accounts, or everyone) can have a largest number of grants, and a largest total length
    of complex patterns. A grant above these limits is refused, and the existing grants stay."""
    put_grants(service, "user", "alice", (f"team{number}/**" for number in range(MAX_GRANTS_PER_SUBJECT)))
    put_grants(service, "everyone", "", (f"**{number}" + "*a" * 120 for number in range(270)))
    with pytest.raises(AccountInvalid, match="no subject can have more"):
        await add_grant(service.accounts, "user:alice", "other/**", "pull")
    await add_grant(service.accounts, "user:alice", "team0/**", "push")
    with pytest.raises(AccountInvalid, match="would be too long in total"):
        await add_grant(service.accounts, "everyone", "**/x*y", "pull")
    await add_grant(service.accounts, "everyone", "public/**", "pull")
