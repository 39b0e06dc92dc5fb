"""Runs the whole application with a real store inside the test process. Its accounts log in with API tokens."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from registry.app import Entrepot, create_app
from registry.auth.token import api_tokens
from registry.config import Settings
from registry.service_factory import shared_rate_limit
from storage.access import AccountName, TokenLimit
from storage.accounts import Accounts
from storage.composition import prepare_data_dir
from storage.interface import Registry
from tests.fakes.asgi_client import AsgiClient
from tests.fakes.store_accounts import BY, add_account


async def until(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds. Raises TimeoutError after 30 seconds."""
    async with asyncio.timeout(30):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


class AppInProcess:
    """A running application. `client` sends requests to it. `accounts` is its store of accounts; `hosted` is its
    registry of pushed content, without access checks."""

    def __init__(self, app: Entrepot, data: Path) -> None:
        assert app.service.access is not None
        self.app = app
        self.data = data
        self.client = AsgiClient(app)
        self.hosted: Registry = app.service.unchecked_registry
        self.accounts: Accounts = app.service.access.policy.accounts
        self.audit_buffer = app.service.access.components.audit_buffer

    async def user(self, name: str, *, admin: bool = False, robot: bool = False) -> str:
        """Adds an account, and returns the Authorization header of a login with an API token."""
        await add_account(self.accounts, name, admin=admin, robot=robot)
        return await self.token(name)

    async def token(self, name: str, limits: Iterable[TokenLimit] | None = None) -> str:
        """Adds an API token, with `limits` if given, and returns the Authorization header of a login with it."""
        new_token = api_tokens.make(AccountName(name), now=0.0, limits=None if limits is None else tuple(limits))
        await self.accounts.add_token(new_token.token, new_token.secret_hash, by=BY)
        return "Basic " + base64.b64encode(f"{name}:{new_token.text}".encode()).decode()

    async def bearer(self, login: str | None, *scopes: str) -> str:
        """Gets a bearer token for `scopes` from `/token`, and returns the Authorization header for it. `login`: the
        Authorization header of the request; None: no login."""
        query = "&".join(f"scope={quote(scope)}" for scope in scopes)
        answer = await self.client("GET", f"/token?service=entrepot&{query}", {"authorization": login} if login else {})
        assert answer.status == 200, answer.body
        document: dict[str, Any] = json.loads(answer.body)
        return f"Bearer {document['token']}"


@asynccontextmanager
async def running_app(
    folder: Path, clock: Callable[[], float] = time.time, **settings: Any
) -> AsyncIterator[AppInProcess]:
    """Runs the application with a new store in `folder` until the block ends."""
    prepare_data_dir(folder)
    loaded_settings = Settings(data=folder, **settings)
    app = create_app(loaded_settings, rate_limit=shared_rate_limit(loaded_settings), clock=clock)
    async with app.router.lifespan_context(app):
        yield AppInProcess(app, folder)
