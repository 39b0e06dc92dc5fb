"""All of it put together for one process: from settings and a store to credentials and the token service."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from registry.auth.audit_log import AuditBuffer, LoginAudit
from registry.auth.credential_verifier import CredentialVerifier
from registry.auth.external.issuers import Issuers
from registry.auth.external.login_attempts import LoginAttempts
from registry.auth.external.openid_login import OpenIDLogin, provider_stamp
from registry.auth.external.openid_provider import OpenIDProvider, check_provider
from registry.auth.password.hashing import HashingPool
from registry.auth.password.htpasswd import HtpasswdFile
from registry.auth.password.password_check import PasswordCheck
from registry.auth.password.throttle import LoginThrottle
from registry.auth.revocation import RevocationCheck
from registry.auth.rights.sealed_cursors import SealedCursors
from registry.auth.token.bearer_tokens import BearerTokens
from registry.auth.token.login_sessions import LoginSessions
from registry.auth.token.signing_keys import SigningKeys
from registry.auth.token_service.service import ScopePolicy, TokenService
from registry.config import Settings
from registry.config.auth_settings import token_service_name
from storage.accounts import Accounts
from storage.leases import Leases


@dataclass(frozen=True, slots=True)
class AuthComponents:
    """What else in the process asks for. `standing` says whether what a proof was made of still stands. `openid`: None:
    nobody logs in at a provider."""

    credentials: CredentialVerifier
    tokens: BearerTokens
    sessions: LoginSessions
    openid: OpenIDLogin | None
    standing: RevocationCheck
    hashing: HashingPool
    audit_buffer: AuditBuffer
    refresh_lifetime: float
    accounts: Accounts
    clock: Callable[[], float]
    cursors: SealedCursors

    def token_service(self, rights: ScopePolicy) -> TokenService:
        return TokenService(
            self.accounts,
            self.credentials,
            self.tokens,
            rights,
            refresh_lifetime=self.refresh_lifetime,
            clock=self.clock,
        )


def check_auth_files(settings: Settings) -> None:
    """For the start, before any fork. Raises HtpasswdError: the htpasswd file cannot be used; ProviderInvalid."""
    if settings.auth.htpasswd:
        HtpasswdFile(settings.auth.htpasswd).check()
    check_provider(settings.oidc)


@asynccontextmanager
async def open_auth_components(
    settings: Settings,
    accounts: Accounts,
    turns: Leases,
    *,
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
) -> AsyncIterator[AuthComponents]:
    """For this process and its running event loop. No issuer and no provider is contacted. At the end, what was being
    verified is ended, and what was gathered for the audit log is written; the store must still be open then."""
    htpasswd = HtpasswdFile(settings.auth.htpasswd) if settings.auth.htpasswd else None
    issuers = Issuers(settings.issuer, accounts, clock, monotonic)
    hashing = HashingPool(turns)
    notes = AuditBuffer(accounts, clock)
    logins = LoginAudit(accounts, notes, clock)
    openid_stamps = [provider_stamp(settings.oidc)] if settings.oidc.issuer else []
    standing = RevocationCheck(accounts, htpasswd, [*issuers.stamps, *openid_stamps])
    passwords = PasswordCheck(accounts, hashing, LoginThrottle(accounts, clock), clock, htpasswd)
    service, keys = token_service_name(settings.auth, settings.public_url), SigningKeys(accounts, clock)
    tokens = BearerTokens(accounts, service, settings.auth.token_ttl, clock)
    sessions = LoginSessions(accounts, keys, service, clock)
    openid = None
    if settings.oidc.issuer:
        provider, attempts = OpenIDProvider(settings.oidc, monotonic), LoginAttempts(keys, clock)
        openid = OpenIDLogin(settings.oidc, accounts, provider, attempts, sessions, logins, clock)
    credentials = CredentialVerifier(accounts, tokens, issuers, passwords, standing, logins, clock)
    try:
        refresh_ttl = settings.auth.refresh_ttl
        yield AuthComponents(
            *(credentials, tokens, sessions, openid, standing, hashing, notes, refresh_ttl, accounts, clock),
            cursors=SealedCursors(keys.secrets),
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
