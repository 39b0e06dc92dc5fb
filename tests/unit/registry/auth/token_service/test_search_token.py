"""The bearer token that `docker search` uses after a login."""

from __future__ import annotations

from pathlib import Path

import httpx2

from storage.composition import open_registry, prepare_data_dir
from tests.fakes.app_in_process import AppInProcess, running_app
from tests.fakes.page_store import add_cached
from tests.fakes.store_accounts import add_grant, limit

SEARCH_SCOPE = "registry:catalog:search"


async def search(app: AppInProcess, token: str) -> list[str]:
    """Returns the repositories that a search for `app` finds with this token."""
    transport = httpx2.ASGITransport(app=app.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://registry.test") as client:
        answer = await client.get("/v1/search?q=app", headers={"authorization": token})
    assert answer.status_code == 200, answer.text
    return sorted(result["name"] for result in answer.json()["results"])


async def test_a_search_finds_repositories_that_the_account_may_pull(tmp_path: Path) -> None:
    """With a token for searches, a search finds all repositories that the account may pull. If the login used an API
    token with limits, the search finds only repositories within the limits. With a token for certain repositories, the
    search finds only these."""
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path) as store:
        for repo in ("team/app", "team/app-web", "secret/app"):
            await add_cached(store, repo, "v1")
        await store.search_indexer.run()
    async with running_app(tmp_path) as app:
        login = await app.user("alice")
        await add_grant(app.accounts, "user:alice", "team/**", "pull")
        assert await search(app, await app.bearer(login, SEARCH_SCOPE)) == ["team/app", "team/app-web"]
        limited = await app.token("alice", [limit("team/app", "pull"), limit("secret/**", "pull")])
        assert await search(app, await app.bearer(limited, SEARCH_SCOPE)) == ["team/app"]
        scopes = ("repository:team/app-web:pull", "repository:secret/app:pull", "registry:catalog:delete")
        assert await search(app, await app.bearer(login, *scopes)) == ["team/app-web"]
