"""Checks that each visitor sees exactly the repositories that their grants allow, on pages and in the responses of
APIs.

A *place* is a page or an API that shows repositories. A *phase* is a set of grants to everyone and to all accounts. A
*cell* is one visitor and one repository at one place in one phase. The repositories that a place shows are compared
with `tests.fakes.access_matrix.may_pull`. A repository that the visitor may not pull is *hidden*. No response may
contain its name, unless the request has this name, nor the secret word in its tag, labels and description.
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
    Grants,
    MatrixVisitor,
    SharedGrants,
    matrix_visitors,
    may_pull,
    mirrored_name,
)
from tests.fakes.page_store import add_cached, add_described
from tests.fakes.registry_content import BY
from tests.fakes.store_accounts import add_grant, limit
from tests.unit.registry.ui.test_pages import Site, password_hash, site

SAME_TAG = "same"
"""A tag that each repository has. It points at the same image in all of them."""
SHARED_LABEL = "everywhere"
"""A label that the image of each repository has."""
FIRST_PAGE_HITS = 8
"""The number of results of each kind on a search page. If there are more, the page has a link to them."""


@dataclass
class Content:
    """`same`: the digest of the image that all repositories have. `own`: for each repository, the digest of an index
    that no other repository has."""

    same: Digest
    own: dict[str, Digest]


@dataclass
class Visitor:
    """A visitor of the matrix, with a browser for pages and a client for the APIs. `profile` has the visitor's account
    and grants. `sees` has the repositories that the visitor may pull in the present phase. `cells` counts the checked
    cells."""

    profile: MatrixVisitor
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
        """Whether a search gets a result. An anonymous visitor who may pull nothing has to log in instead."""
        return self.profile.name is not None or bool(self.sees)

    async def get(self, path: str, *, requested_repository: str = "", api: bool = False) -> httpx2.Response:
        """Gets a page, or (`api`) a response of an API. Records a problem for each hidden name or word in it.
        `requested_repository` is the repository that the path names."""
        answer = await (self.client if api else self.browser).get(path)
        text = unquote(answer.text + str(answer.headers.get("link", "")) + str(answer.headers.get("location", "")))
        for repo in self.hidden:
            word = REPOSITORIES[repo]
            if (word in text and word not in path) or (repo != requested_repository and contains_name(text, repo)):
                self.record_problem(path, f"leaks {repo}")
        return answer

    def record_problem(self, place: str, problem: str) -> None:
        self.problems.append(f"{self.profile.label}, grants {self.phase}, {place}: {problem}")

    def expect(self, place: str, found: object, wanted: object, cells: int = 1) -> None:
        """Records a problem if `found` is not `wanted`, and counts the cells."""
        self.cells += cells
        if found != wanted:
            self.record_problem(place, f"shows {found}, and should show {wanted}")

    def expect_names(self, place: str, found: Iterable[str], among: Iterable[str] = REPOSITORIES) -> None:
        """Compares a list of names with those repositories in `among` that the visitor may pull."""
        names = set(found)
        wanted = [repo for repo in among if repo in self.sees]
        self.expect(place, sorted(names), sorted(wanted), len(set(among)))


def contains_name(text: str, repo: str) -> bool:
    """Returns whether a text has the name of a repository, and not only as a part of another name."""
    return re.search(rf"(?<![a-z0-9._/-]){re.escape(repo)}(?![a-z0-9._-]|/[a-z0-9])", text) is not None


def hosted_repositories() -> list[str]:
    return [repo for repo in REPOSITORIES if not repo.startswith((f"{MIRROR}/", f"{PRIVATE}/"))]


def repositories_of(upstream: str) -> list[str]:
    return [repo for repo in REPOSITORIES if repo.startswith(f"{upstream}/")]


async def check_lists(visitor: Visitor, content: Content) -> None:
    """Checks the places that list or count repositories."""
    if visitor.profile.has_session:
        await check_repository_list(visitor)
        await check_search_page(visitor, content)
    await check_apis(visitor, content)


async def check_repository_list(visitor: Visitor) -> None:
    page = await visitor.get("/ui/repositories")
    visitor.expect_names("the hosted repositories", listed_on(page), hosted_repositories())
    filtered_page = await visitor.get("/ui/repositories?q=team")
    visitor.expect_names(
        "those with a prefix",
        listed_on(filtered_page),
        [repo for repo in hosted_repositories() if repo.startswith("team")],
    )
    for upstream in (MIRROR, PRIVATE):
        answer = await visitor.get(f"/ui/repositories?in={upstream}")
        if answer.status_code == 404:
            visitor.expect_names(f"the repositories of {upstream}", [], repositories_of(upstream))
        else:
            visitor.expect_names(f"the repositories of {upstream}", listed_on(answer), repositories_of(upstream))


async def check_search_page(visitor: Visitor, content: Content) -> None:
    if not visitor.may_search:
        for query in ("app", content.same):
            answer = await visitor.get(f"/ui/search?q={query}")
            redirect = unquote(answer.headers.get("location", ""))
            visitor.expect("the search page", redirect, f"/ui/login?next=/ui/search?q={query}", len(REPOSITORIES))
        return
    for kind, query in searches_for_all(content):
        visitor.expect_names(f"the search for {kind}", await found_on_pages(visitor, kind, query))
    results = await visitor.get("/ui/search?q=app")
    visitor.expect(
        "the link to more", ">Show more" in results.text, len(visitor.sees) > FIRST_PAGE_HITS, len(REPOSITORIES)
    )


async def check_apis(visitor: Visitor, content: Content) -> None:
    for kind, query in searches_for_all(content):
        answer = await visitor.get(f"/api/v1/search?kind={kind}&limit=100&q={quote(query)}", api=True)
        if visitor.may_search:
            result = answer.json()[kind]
            visitor.expect_names(f"the API's search for {kind}", [each["repository"] for each in result["items"]])
            visitor.expect("its next page", result["next"], None)
        else:
            visitor.expect("the API's search", answer.status_code, 401, len(REPOSITORIES))
    docker_search = await visitor.get("/v1/search?q=app&n=100", api=True)
    if visitor.sees or visitor.profile.name is not None:
        document = docker_search.json()
        visitor.expect_names("the old search", [each["name"] for each in document["results"]])
        visitor.expect("its count", document["num_results"], len(visitor.sees), len(REPOSITORIES))
    else:
        visitor.expect("the old search", docker_search.status_code, 401, len(REPOSITORIES))
    names, path = list[str](), "/v2/_catalog?n=4"
    while path:
        answer = await visitor.get(path, api=True)
        if answer.status_code == 401:
            visitor.expect("the list of /v2", visitor.profile.name, None)
            return
        names += answer.json()["repositories"]
        next_link = re.match("<([^>]+)>", answer.headers.get("link", ""))
        path = next_link[1] if next_link else ""
    visitor.expect_names("the list of /v2", names)


def searches_for_all(content: Content) -> Iterator[tuple[str, str]]:
    """Yields for each kind of result a search that finds all repositories."""
    yield from (("repositories", "app"), ("tags", SAME_TAG), ("labels", SHARED_LABEL), ("digests", content.same))


def listed_on(answer: httpx2.Response) -> list[str]:
    """Returns the names in the list on a page. The list must not have further pages."""
    assert ">Show more" not in answer.text
    return re.findall(r'<li><a href="/ui/repositories/[^"]+">([^<]+)</a></li>', answer.text)


async def found_on_pages(visitor: Visitor, kind: str, query: str) -> list[str]:
    """Returns the repositories that a search finds, over all pages. A search with only one result redirects to it."""
    names, path = list[str](), f"/ui/search?kind={kind}&q={quote(query)}"
    while path:
        answer = await visitor.get(path)
        if answer.status_code == 303:
            return [name_in(answer.headers["location"])]
        names += [name_in(link) for link in re.findall(r'<li><a href="([^"]+)">', answer.text)]
        next_link = re.search(r'<a class="button" href="([^"]+)">Show more', answer.text)
        path = next_link[1].replace("&amp;", "&") if next_link else ""
    return names


def name_in(path: str) -> str:
    """Returns the name of the repository in the path of a page."""
    return re.split("[:@]", unquote(path).removeprefix("/ui/repositories/"))[0]


async def check_repository(visitor: Visitor, repo: str, content: Content, random_choice: random.Random) -> None:
    """Checks two of the places that show one repository, chosen at random. A hidden repository has to look like a
    missing one."""
    if visitor.profile.has_session:
        await check_page(visitor, repo, content, random_choice.randrange(6))
    await check_answer(visitor, repo, content, random_choice.randrange(4))


async def check_page(visitor: Visitor, repo: str, content: Content, number: int) -> None:
    word, digest, is_seen = REPOSITORIES[repo], content.own[repo], repo in visitor.sees
    path = f"/ui/repositories/{repo}"
    paths = (path, f"{path}:{word}", f"{path}@{digest}", f"{path}:{SAME_TAG}")
    if number < len(paths):
        answer = await visitor.get(paths[number], requested_repository=repo)
        # An anonymous visitor is redirected to the login, unless they may pull the mirrored repository of this name.
        is_redirected = visitor.profile.name is None and not is_mirror_seen(visitor, repo)
        visitor.expect(paths[number], answer.status_code, 200 if is_seen else 303 if is_redirected else 404)
        if is_seen and number < 3:
            visitor.expect(f"{paths[number]}, whole", word in answer.text, True)
    elif visitor.may_search:
        # A search for a reference redirects to its page. So does a search for a digest that only one repository has.
        answer = await visitor.get(
            f"/ui/search?q={f'{repo}:{word}' if number == 4 else digest}", requested_repository=repo
        )
        visitor.expect(f"what finds {repo}", answer.status_code, 303 if is_seen else 200)


async def check_answer(visitor: Visitor, repo: str, content: Content, number: int) -> None:
    word, is_seen, shared_grants = REPOSITORIES[repo], repo in visitor.sees, PHASES[visitor.phase]
    paths = (
        f"/api/v1/repositories/{repo}/manifests/{content.own[repo]}/referrers",
        f"/api/v1/repositories/{repo}/tag-list",
        f"/v1/repositories/{repo}/tags",
    )
    if number < len(paths):
        answer = await visitor.get(paths[number], requested_repository=repo, api=True)
        # 401 asks for another credential: from an anonymous visitor, or if only the limits of a token hide the
        # repository.
        needs_login = visitor.profile.name is None or may_pull(
            replace(visitor.profile, limits=None), repo, shared_grants
        )
        status_if_hidden = 401 if needs_login and not is_mirror_seen(visitor, repo) else 404
        visitor.expect(paths[number], answer.status_code, 200 if is_seen else status_if_hidden)
    elif visitor.may_search:
        answer = await visitor.get(
            f"/api/v1/search?kind=repositories&q={repo}:{word}", requested_repository=repo, api=True
        )
        visitor.expect(f"the target {repo}", answer.json()["target"] is not None, is_seen)


def is_mirror_seen(visitor: Visitor, repo: str) -> bool:
    """Returns whether the visitor may pull the mirrored repository that the name would mean if nothing had been pushed
    to it."""
    return repo in hosted_repositories() and may_pull(visitor.profile, mirrored_name(repo), PHASES[visitor.phase])


async def add_repositories(server: Site) -> Content:
    """Stores the repositories of the matrix, and returns their digests."""
    own = {}
    for repo, word in REPOSITORIES.items():
        index = await add_described(server.store, repo, word, f"{word} {SHARED_LABEL}")
        own[repo] = index.digest
        same = await add_cached(server.store, repo, SAME_TAG)
        await server.store.descriptions.put_description(RepositoryName(repo), f"For {word}.", by=BY)
    await server.store.search_indexer.run()
    return Content(same.digest, own)


async def add_visitor(server: Site, profile: MatrixVisitor, problems: list[str]) -> Visitor:
    """Adds the account of a visitor with its grants, and logs the visitor in."""
    accounts = server.app.accounts
    headers = {}
    if profile.name is not None:
        if profile.name not in {account.name for account in accounts.accounts(None, None, 1000).items}:
            kind = AccountKind.ROBOT if profile.is_robot else AccountKind.USER
            hashed = None if profile.is_robot else password_hash()
            await accounts.add_account(AccountName(profile.name), kind, password_hash=hashed, admin=False, by=BY)
        if profile.group is not None:
            await accounts.add_group(AccountName(profile.group), by=BY)
            await accounts.add_member(AccountName(profile.group), AccountName(profile.name), by=BY)
        for pattern, actions in profile.grants:
            await add_grant(accounts, profile.subject, pattern, actions)
        limits = None if profile.limits is None else [limit(*each) for each in profile.limits]
        headers = {"authorization": await server.app.token(profile.name, limits)}
    browser = server.browser()
    if profile.name is not None and profile.has_session:
        assert (await server.log_in(browser, profile.name)).status_code == 303
    return Visitor(profile, browser, server.browser(**headers), problems)


async def change_grants(server: Site, subject: str, old: Grants, new: Grants) -> None:
    for pattern, _ in old:
        await server.app.accounts.remove_grant(Grantee.parse(subject), NamePattern(pattern), by=BY)
    for pattern, actions in new:
        await add_grant(server.app.accounts, subject, pattern, actions)


@pytest.mark.slow
async def test_visitors_see_exactly_what_they_may_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each phase, each place shows each visitor exactly the repositories that the visitor may pull. After a change
    of the grants, the next response is right."""
    # On a busy machine, a search could reach its time limit and find too little.
    monkeypatch.setattr(search_scope, "MAX_SECONDS", 60.0)
    async with site(tmp_path, upstream=UPSTREAMS) as server:
        content, problems, previous = await add_repositories(server), list[str](), SharedGrants()
        random_choice = random.Random(1)
        visitors = [await add_visitor(server, profile, problems) for profile in matrix_visitors()]
        for phase, shared_grants in PHASES.items():
            await change_grants(server, "everyone", previous.everyone, shared_grants.everyone)
            await change_grants(server, "authenticated", previous.authenticated, shared_grants.authenticated)
            previous = shared_grants
            for visitor in visitors:
                visitor.phase = phase
                visitor.sees = {repo for repo in REPOSITORIES if may_pull(visitor.profile, repo, shared_grants)}
                await check_lists(visitor, content)
                for repo in REPOSITORIES:
                    await check_repository(visitor, repo, content, random_choice)
        for visitor in visitors:
            await visitor.browser.aclose()
            await visitor.client.aclose()
        assert not problems, "\n".join(problems[:50])
        assert sum(visitor.cells for visitor in visitors) > 4000
