"""Limits of the previews of retention that accounts request."""

from __future__ import annotations

import asyncio
from pathlib import Path

from registry.config import RetentionRule
from storage.names import RepositoryName
from tests.fakes.app_in_process import running_app, until
from tests.fakes.registry_content import push_image
from tests.fakes.store_accounts import add_grant

PREVIEW = "/api/v1/retention/preview?repository=team/app&limit=1"


async def test_previews_of_one_account_are_limited(tmp_path: Path) -> None:
    """A process makes one preview at a time for an account, and further ones wait. Other accounts get theirs
    meanwhile."""
    rules = [RetentionRule(repositories=["team/**"], keep_last=1)]
    async with running_app(tmp_path / "data", retention=rules) as app:
        await push_image(app.hosted, RepositoryName("team/app"), "image", "v1")
        logins = {name: {"authorization": await app.user(name)} for name in ("alice", "bob")}
        for name in logins:
            await add_grant(app.accounts, f"user:{name}", "team/**", "admin")
        assert app.app.service.access is not None
        slots = app.app.service.access.management.upkeep.retention_preview.slots
        async with asyncio.TaskGroup() as tasks, slots.slot("account alice"):
            waiting = tasks.create_task(app.client("GET", PREVIEW, logins["alice"]))
            await until(lambda: slots.pending > 1)
            async with asyncio.timeout(30):
                assert (await app.client("GET", PREVIEW, logins["bob"])).json["totals"]["complete"]
            assert not waiting.done()
        assert waiting.result().json["totals"]["tags_kept"] == 1
