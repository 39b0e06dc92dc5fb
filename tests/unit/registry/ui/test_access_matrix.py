"""What each visitor sees, on pages and through the APIs that people and `docker search` ask, is what their grants say.

A *cell* is one visitor and one repository at one place, while certain grants for everybody exist. Which repositories a
place shows is compared with `tests.fakes.access_matrix.may_pull`. Besides, no answer contains the name of a hidden
repository, unless it was asked for, or a word that stands in its tag, labels or description.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, unquote

import httpx2
import pytest

from storage.access import AccountKind, AccountName, Grantee
from storage.metadata.sqlite.search import search_scope
from storage.names import Digest, RepositoryName
from storage.patterns import NamePattern
from tests.fakes.access_matrix import (
    MIRROR,
    PHASES,
    PRIVATE,
    REPOSITORIES,
    UPSTREAMS,
    Everybody,
    Grants,
    MatrixVisitor,
    matrix_visitors,
    may_pull,
    mirrored_name,
)
from tests.fakes.page_store import add_cached, add_described
from tests.fakes.registry_content import BY
from tests.fakes.store_accounts import add_grant, limit
from tests.unit.registry.ui.test_pages import Site, password_hash, site

SAME = "same"
"""A tag of each repository, which leads to the same image in all of them."""
NOT_THERE = "nothing/there"
SHARED_LABEL = "everywhere"
HITS = 8
"""How many entries of each kind a search page has, before it has a link to more."""


@dataclass
class Content:
    """The digests in the repositories: of the image that all have, and of the index that one alone has."""

    same: Digest
    own: dict[str, Digest]


@dataclass
class Visitor:
    """Somebody with a browser, a client of the APIs, and what the grants let them see."""

    who: MatrixVisitor
    browser: httpx2.AsyncClient
    client: httpx2.AsyncClient
    problems: list[str]
    sees: set[str] = field(default_factory=set)
    phase: str = ""
    cells: int = 0

    @property
    def hidden(self) -> set[str]:
        return REPOSITORIES.keys() - self.sees

    @property
    def may_search(self) -> bool:
        """Whether a search is answered: nobody in particular is asked to log in if there is nothing to find."""
        return self.who.name is not None or bool(self.sees)

    async def get(self, path: str, *, asked: str = "", api: bool = False) -> httpx2.Response:
        """Gets a page, or what an API answers. Notes each hidden name and word in it. `asked`: the repository that the
        path names."""
        answer = await (self.client if api else self.browser).get(path)
        text = unquote(answer.text + str(answer.headers.get("link", "")) + str(answer.headers.get("location", "")))
        for repo in self.hidden:
            word = REPOSITORIES[repo]
            if (word in text and word not in path) or (repo != asked and contains_name(text, repo)):
                self.note(path, f"leaks {repo}")
        return answer

    def note(self, place: str, problem: str) -> None:
        self.problems.append(f"{self.who.label}, grants {self.phase}, {place}: {problem}")

    def expect(self, place: str, found: object, wanted: object, cells: int = 1) -> None:
        self.cells += cells
        if found != wanted:
            self.note(place, f"shows {found}, and should show {wanted}")

    def expect_names(self, place: str, found: Iterable[str], among: Iterable[str] = REPOSITORIES) -> None:
        """Compares a list with the repositories that the visitor sees of those that it is about."""
        names = set(found)
        wanted = [repo for repo in among if repo in self.sees]
        self.expect(place, sorted(names), sorted(wanted), len(set(among)))


def contains_name(text: str, repo: str) -> bool:
    """Whether a text has the name of a repository, and not only as a part of another name."""
    return re.search(rf"(?<![a-z0-9._/-]){re.escape(repo)}(?![a-z0-9._-]|/[a-z0-9])", text) is not None


def hosted() -> list[str]:
    return [repo for repo in REPOSITORIES if not repo.startswith((f"{MIRROR}/", f"{PRIVATE}/"))]


def below(upstream: str) -> list[str]:
    return [repo for repo in REPOSITORIES if repo.startswith(f"{upstream}/")]


async def check_lists(visitor: Visitor, content: Content) -> None:
    """The places that list repositories, and what they count."""
    if visitor.who.has_session:
        await check_repository_list(visitor)
        await check_search_page(visitor, content)
    await check_apis(visitor, content)


async def check_repository_list(visitor: Visitor) -> None:
    shown = await visitor.get("/ui/repositories")
    visitor.expect_names("the hosted repositories", listed_on(shown), hosted())
    narrow = await visitor.get("/ui/repositories?q=team")
    visitor.expect_names(
        "those with a prefix", listed_on(narrow), [repo for repo in hosted() if repo.startswith("team")]
    )
    for upstream in (MIRROR, PRIVATE):
        answer = await visitor.get(f"/ui/repositories?in={upstream}")
        if answer.status_code == 404:
            visitor.expect_names(f"the repositories of {upstream}", [], below(upstream))
        else:
            visitor.expect_names(f"the repositories of {upstream}", listed_on(answer), below(upstream))


async def check_search_page(visitor: Visitor, content: Content) -> None:
    if not visitor.may_search:
        for query in ("app", content.same):
            answer = await visitor.get(f"/ui/search?q={query}")
            where = unquote(answer.headers.get("location", ""))
            visitor.expect("the search page", where, f"/ui/login?next=/ui/search?q={query}", len(REPOSITORIES))
        return
    for kind, query in searches(content):
        visitor.expect_names(f"the search for {kind}", await found_on_pages(visitor, kind, query))
    everything = await visitor.get("/ui/search?q=app")
    visitor.expect("the link to more", ">Show more" in everything.text, len(visitor.sees) > HITS, len(REPOSITORIES))


async def check_apis(visitor: Visitor, content: Content) -> None:
    for kind, query in searches(content):
        answer = await visitor.get(f"/api/v1/search?kind={kind}&limit=100&q={quote(query)}", api=True)
        if visitor.may_search:
            found = answer.json()[kind]
            visitor.expect_names(f"the API's search for {kind}", [each["repository"] for each in found["items"]])
            visitor.expect("its next page", found["next"], None)
        else:
            visitor.expect("the API's search", answer.status_code, 401, len(REPOSITORIES))
    old = await visitor.get("/v1/search?q=app&n=100", api=True)
    if visitor.sees or visitor.who.name is not None:
        document = old.json()
        visitor.expect_names("the old search", [each["name"] for each in document["results"]])
        visitor.expect("its count", document["num_results"], len(visitor.sees), len(REPOSITORIES))
    else:
        visitor.expect("the old search", old.status_code, 401, len(REPOSITORIES))
    names, path = list[str](), "/v2/_catalog?n=4"
    while path:
        answer = await visitor.get(path, api=True)
        if answer.status_code == 401:
            visitor.expect("the list of /v2", visitor.who.name, None)
            return
        names += answer.json()["repositories"]
        more = re.match("<([^>]+)>", answer.headers.get("link", ""))
        path = more[1] if more else ""
    visitor.expect_names("the list of /v2", names)


def searches(content: Content) -> Iterator[tuple[str, str]]:
    """Searches of each kind that find all repositories."""
    yield from (("repositories", "app"), ("tags", SAME), ("labels", SHARED_LABEL), ("digests", content.same))


def listed_on(answer: httpx2.Response) -> list[str]:
    """The names in the list on a page, which is the only one."""
    assert ">Show more" not in answer.text
    return re.findall(r'<li><a href="/ui/repositories/[^"]+">([^<]+)</a></li>', answer.text)


async def found_on_pages(visitor: Visitor, kind: str, query: str) -> list[str]:
    """The repositories of what a search has found. What finds one thing alone leads to it."""
    names, path = list[str](), f"/ui/search?kind={kind}&q={quote(query)}"
    while path:
        answer = await visitor.get(path)
        if answer.status_code == 303:
            return [name_in(answer.headers["location"])]
        names += [name_in(found) for found in re.findall(r'<li><a href="([^"]+)">', answer.text)]
        more = re.search(r'<a class="button" href="([^"]+)">Show more', answer.text)
        path = more[1].replace("&amp;", "&") if more else ""
    return names


def name_in(path: str) -> str:
    return re.split("[:@]", unquote(path).removeprefix("/ui/repositories/"))[0]


async def check_repository(visitor: Visitor, repo: str, content: Content, chance: random.Random) -> None:
    """Two of the places that show one repository. A hidden one is like one that is not there."""
    if visitor.who.has_session:
        await check_page(visitor, repo, content, chance.randrange(6))
    await check_answer(visitor, repo, content, chance.randrange(4))


async def check_page(visitor: Visitor, repo: str, content: Content, number: int) -> None:
    word, digest, is_seen = REPOSITORIES[repo], content.own[repo], repo in visitor.sees
    path = f"/ui/repositories/{repo}"
    paths = (path, f"{path}:{word}", f"{path}@{digest}", f"{path}:{SAME}")
    if number < len(paths):
        answer = await visitor.get(paths[number], asked=repo)
        # Nobody in particular is sent to the login, unless they may pull what the name means at the mirror.
        is_sent = visitor.who.name is None and not is_mirror_seen(visitor, repo)
        visitor.expect(paths[number], answer.status_code, 200 if is_seen else 303 if is_sent else 404)
        if is_seen and number < 3:
            visitor.expect(f"{paths[number]}, whole", word in answer.text, True)
    elif visitor.may_search:
        # A pasted reference leads to the thing. So does a digest that only one repository has.
        answer = await visitor.get(f"/ui/search?q={f'{repo}:{word}' if number == 4 else digest}", asked=repo)
        visitor.expect(f"what finds {repo}", answer.status_code, 303 if is_seen else 200)


async def check_answer(visitor: Visitor, repo: str, content: Content, number: int) -> None:
    word, is_seen, everybody = REPOSITORIES[repo], repo in visitor.sees, PHASES[visitor.phase]
    paths = (
        f"/api/v1/repositories/{repo}/manifests/{content.own[repo]}/referrers",
        f"/api/v1/repositories/{repo}/tag-list",
        f"/v1/repositories/{repo}/tags",
    )
    if number < len(paths):
        answer = await visitor.get(paths[number], asked=repo, api=True)
        needs_login = visitor.who.name is None or may_pull(replace(visitor.who, limits=None), repo, everybody)
        missing = 401 if needs_login and not is_mirror_seen(visitor, repo) else 404
        visitor.expect(paths[number], answer.status_code, 200 if is_seen else missing)
    elif visitor.may_search:
        answer = await visitor.get(f"/api/v1/search?kind=repositories&q={repo}:{word}", asked=repo, api=True)
        visitor.expect(f"the target {repo}", answer.json()["target"] is not None, is_seen)


def is_mirror_seen(visitor: Visitor, repo: str) -> bool:
    """Whether the visitor may pull what the name would mean if nobody had pushed to it."""
    return repo in hosted() and may_pull(visitor.who, mirrored_name(repo), PHASES[visitor.phase])


async def fill(here: Site) -> Content:
    """Writes the repositories."""
    own = {}
    for repo, word in REPOSITORIES.items():
        index = await add_described(here.store, repo, word, f"{word} {SHARED_LABEL}")
        own[repo] = index.digest
        same = await add_cached(here.store, repo, SAME)
        await here.store.descriptions.put_description(RepositoryName(repo), f"For {word}.", by=BY)
    await here.store.search_indexer.run()
    return Content(same.digest, own)


async def enter(here: Site, who: MatrixVisitor, problems: list[str]) -> Visitor:
    """Adds the account of a visitor with its grants, and logs it in."""
    accounts = here.app.accounts
    headers = {}
    if who.name is not None:
        if who.name not in {account.name for account in accounts.accounts(None, None, 1000).items}:
            kind = AccountKind.ROBOT if who.is_robot else AccountKind.USER
            hashed = None if who.is_robot else password_hash()
            await accounts.add_account(AccountName(who.name), kind, password_hash=hashed, admin=False, by=BY)
        if who.group is not None:
            await accounts.add_group(AccountName(who.group), by=BY)
            await accounts.add_member(AccountName(who.group), AccountName(who.name), by=BY)
        for pattern, actions in who.grants:
            await add_grant(accounts, who.subject, pattern, actions)
        limits = None if who.limits is None else [limit(*each) for each in who.limits]
        headers = {"authorization": await here.app.token(who.name, limits)}
    browser = here.browser()
    if who.name is not None and who.has_session:
        assert (await here.log_in(browser, who.name)).status_code == 303
    return Visitor(who, browser, here.browser(**headers), problems)


async def change_grants(here: Site, subject: str, old: Grants, new: Grants) -> None:
    for pattern, _ in old:
        await here.app.accounts.remove_grant(Grantee.parse(subject), NamePattern(pattern), by=BY)
    for pattern, actions in new:
        await add_grant(here.app.accounts, subject, pattern, actions)


@pytest.mark.slow
async def test_what_a_visitor_sees_is_what_they_may_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each place, for each visitor, whatever everybody may do; rights that come and go count at once."""
    monkeypatch.setattr(search_scope, "MAX_SECONDS", 60.0)  # a search that ends early on a busy machine finds less
    async with site(tmp_path, upstream=UPSTREAMS) as here:
        content, problems, before = await fill(here), list[str](), Everybody()
        chance = random.Random(1)
        visitors = [await enter(here, who, problems) for who in matrix_visitors()]
        for phase, everybody in PHASES.items():
            await change_grants(here, "everyone", before.everyone, everybody.everyone)
            await change_grants(here, "authenticated", before.authenticated, everybody.authenticated)
            before = everybody
            for visitor in visitors:
                visitor.phase = phase
                visitor.sees = {repo for repo in REPOSITORIES if may_pull(visitor.who, repo, everybody)}
                await check_lists(visitor, content)
                for repo in REPOSITORIES:
                    await check_repository(visitor, repo, content, chance)
        for visitor in visitors:
            await visitor.browser.aclose()
            await visitor.client.aclose()
        assert not problems, "\n".join(problems[:50])
        assert sum(visitor.cells for visitor in visitors) > 4000
