"""A store with accounts, and the objects with which one worker process checks credentials."""

from __future__ import annotations

import base64
import contextlib
import functools
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.auth.assembly import AuthComponents, open_auth_components
from registry.auth.password.hashing import hash_password
from registry.auth.rights.policy import Policy
from registry.auth.token import api_tokens
from registry.auth.token.api_tokens import NewApiToken
from registry.auth.token_service.service import TokenService
from registry.config import Settings
from storage.access import AccountKind, AccountName, Action, AuditEntry, AuditQuery, Grant, Grantee
from storage.accounts import Accounts
from storage.composition import open_registry, prepare_data_dir
from storage.content import Actor
from storage.patterns import NamePattern
from storage.store.stored_registry import StoredRegistry

ADMIN = Actor("operator")
KNOWN_ADDRESS = Actor(address="192.0.2.1", user_agent="docker/29")
"""The `Actor` of the requests of a client at the usual address."""
OTHER_ADDRESS = Actor(address="198.51.100.7", user_agent="docker/29")
"""The `Actor` of the requests of a client at another address."""
PASSWORD = "correct horse battery"
ALICE, BOB, CI = AccountName("alice"), AccountName("bob"), AccountName("ci")


class AuthClock:
    """A clock that the test sets: a call returns `now`, in seconds since 1970."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@dataclass
class AuthWorker:
    """One worker: its connection to the store, and its objects that check credentials, with their caches."""

    registry: StoredRegistry
    access: AuthComponents
    clock: AuthClock

    @property
    def accounts(self) -> Accounts:
        return self.registry.accounts

    def service(self, **policy: Any) -> TokenService:
        return self.access.token_service(Policy(self.accounts, identity_check=self.access.revocation_check, **policy))

    async def add_user(self, name: AccountName, password: str | None = PASSWORD, *, admin: bool = False) -> None:
        stored_hash = None if password is None else _hash_for(name, password)
        await self.accounts.add_account(name, AccountKind.USER, password_hash=stored_hash, admin=admin, by=ADMIN)

    async def add_robot(self, name: AccountName = CI) -> None:
        await self.accounts.add_account(name, AccountKind.ROBOT, password_hash=None, by=ADMIN)

    async def add_token(self, account: AccountName, **more: Any) -> NewApiToken:
        new_token = api_tokens.make(account, now=self.clock(), **more)
        await self.accounts.add_token(new_token.token, new_token.secret_hash, by=ADMIN)
        return new_token

    async def grant(self, subject: str, pattern: str, actions: str) -> None:
        new_grant = Grant(Grantee.parse(subject), NamePattern(pattern), Action.parse(actions))
        await self.accounts.put_grant(new_grant, by=ADMIN)

    async def audited(self, action: str = "login") -> list[AuditEntry]:
        """Returns the entries of the audit log for an action, newest first. Writes buffered entries to the log
        first."""
        await self.access.audit_buffer.flush()
        return list(self.accounts.audit(AuditQuery(action=action), 100).items)


@functools.cache
def _hash_for(_: AccountName, password: str) -> str:
    """Returns a hash of the password. Computes it only once for each account name and password in a test process,
    because hashing is slow on purpose."""
    return hash_password(password)


@contextlib.asynccontextmanager
async def auth_worker(
    data: Path, clock: AuthClock, settings: Mapping[str, Any] | None = None
) -> AsyncIterator[AuthWorker]:
    """Opens a worker on the data directory `data` until the block ends. A second call for the same directory opens a
    second worker."""
    prepare_data_dir(data)
    loaded_settings = Settings(data=data, **(settings or {}))
    async with (
        open_registry(data, clock=clock) as registry,
        open_auth_components(
            loaded_settings, registry.accounts, registry.leases, clock=clock, monotonic=clock
        ) as access,
    ):
        yield AuthWorker(registry, access, clock)


def basic(user: str, secret: str) -> str:
    """Returns the value of the Authorization header for HTTP basic authentication."""
    return "Basic " + base64.b64encode(f"{user}:{secret}".encode()).decode()
