"""All of it put together for one process: from settings and a store to credentials and the token service."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from registry.auth.attempts import Attempts
from registry.auth.credentials import Credentials
from registry.auth.hashing import Hashing
from registry.auth.htpasswd import Htpasswd
from registry.auth.issuers import Issuers
from registry.auth.logins import Logins
from registry.auth.notes import AuditBuffer
from registry.auth.openid import OpenIDLogin, stamp_of
from registry.auth.pace import Pace
from registry.auth.password_check import PasswordCheck
from registry.auth.positions import Positions
from registry.auth.provider import Provider, check_provider
from registry.auth.service import Rights, TokenService
from registry.auth.sessions import Sessions
from registry.auth.signing import Keys
from registry.auth.standing import Standing
from registry.auth.tokens import Tokens
from registry.config import Settings
from registry.config.auth import service_of
from storage.accounts import Accounts
from storage.interface import Turns


@dataclass(frozen=True, slots=True)
class Access:
    """What else in the process asks for. `standing` says whether what a proof was made of still stands. `openid`: None:
    nobody logs in at a provider."""

    credentials: Credentials
    tokens: Tokens
    sessions: Sessions
    openid: OpenIDLogin | None
    standing: Standing
    hashing: Hashing
    notes: AuditBuffer
    refresh_lifetime: float
    accounts: Accounts
    clock: Callable[[], float]
    positions: Positions

    def token_service(self, rights: Rights) -> TokenService:
        return TokenService(
            self.accounts,
            self.credentials,
            self.tokens,
            rights,
            refresh_lifetime=self.refresh_lifetime,
            clock=self.clock,
        )


def check_files(settings: Settings) -> None:
    """For the start, before any fork. Raises HtpasswdError: the htpasswd file cannot be used; ProviderInvalid."""
    if settings.auth.htpasswd:
        Htpasswd(settings.auth.htpasswd).check()
    check_provider(settings.oidc)


@asynccontextmanager
async def open_access(
    settings: Settings,
    accounts: Accounts,
    turns: Turns,
    *,
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
) -> AsyncIterator[Access]:
    """For this process and its running event loop. No issuer and no provider is contacted. At the end, what was being
    verified is ended, and what was gathered for the audit log is written; the store must still be open then."""
    htpasswd = Htpasswd(settings.auth.htpasswd) if settings.auth.htpasswd else None
    issuers = Issuers(settings.issuer, accounts, clock, monotonic)
    hashing = Hashing(turns)
    notes = AuditBuffer(accounts, clock)
    logins = Logins(accounts, notes, clock)
    openid_stamps = [stamp_of(settings.oidc)] if settings.oidc.issuer else []
    standing = Standing(accounts, htpasswd, [*issuers.stamps, *openid_stamps])
    passwords = PasswordCheck(accounts, hashing, Pace(accounts, clock), clock, htpasswd)
    service, keys = service_of(settings.auth, settings.public_url), Keys(accounts, clock)
    tokens = Tokens(accounts, service, settings.auth.token_ttl, clock)
    sessions = Sessions(accounts, keys, service, clock)
    openid = None
    if settings.oidc.issuer:
        provider, attempts = Provider(settings.oidc, monotonic), Attempts(keys, clock)
        openid = OpenIDLogin(settings.oidc, accounts, provider, attempts, sessions, logins, clock)
    credentials = Credentials(accounts, tokens, issuers, passwords, standing, logins, clock)
    try:
        refresh_ttl = settings.auth.refresh_ttl
        yield Access(
            *(credentials, tokens, sessions, openid, standing, hashing, notes, refresh_ttl, accounts, clock),
            positions=Positions(keys.secrets),
        )
    finally:
        if openid is not None:
            await openid.aclose()
        await credentials.aclose()
        await passwords.aclose()
        await issuers.aclose()
        await logins.aclose()
        await notes.aclose()
        hashing.close()
