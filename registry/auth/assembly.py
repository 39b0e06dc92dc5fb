"""Creates the objects that authenticate requests in one process, from the settings and the store of accounts."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from registry.auth.audit_log import AuditBuffer, LoginAudit, OnLogin
from registry.auth.credential_verifier import CredentialVerifier
from registry.auth.external.issuers import Issuers
from registry.auth.external.login_attempts import LoginAttempts
from registry.auth.external.openid_login import OpenIDLogin
from registry.auth.external.openid_provider import OpenIDProvider
from registry.auth.external.openid_settings import check_provider, provider_stamp
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
    """The objects that authenticate requests, for use by other packages.

    - `openid_login`: the login at the OpenID provider; None if the settings name no provider.
    - `refresh_lifetime`: the lifetime of a refresh token, in seconds.
    - `clock`: returns seconds since 1970.
    - `cursors`: encrypts the cursors with which clients page through lists.
    - `htpasswd`: the htpasswd file; None if the settings name no such file."""

    credential_verifier: CredentialVerifier
    bearer_tokens: BearerTokens
    login_sessions: LoginSessions
    openid_login: OpenIDLogin | None
    revocation_check: RevocationCheck
    hashing_pool: HashingPool
    audit_buffer: AuditBuffer
    refresh_lifetime: float
    accounts: Accounts
    clock: Callable[[], float]
    cursors: SealedCursors
    htpasswd: HtpasswdFile | None

    def token_service(self, rights: ScopePolicy) -> TokenService:
        """Returns a token service, which issues tokens at `/token`. `rights`: the policy that computes the access
        that a token can grant."""
        return TokenService(
            self.accounts,
            self.credential_verifier,
            self.bearer_tokens,
            rights,
            refresh_lifetime=self.refresh_lifetime,
            clock=self.clock,
        )


def check_auth_files(settings: Settings) -> None:
    """Checks the htpasswd file, the settings of the OpenID provider, and the client secret for this provider. The
    server calls this function before it forks workers. Raises HtpasswdError or ProviderInvalid if a check fails."""
    if settings.auth.htpasswd:
        HtpasswdFile(settings.auth.htpasswd).check()
    check_provider(settings.oidc)
    if settings.oidc.issuer:
        import registry.auth.external.openid_protocol  # noqa: F401  # before the fork, so that workers share its memory


@asynccontextmanager
async def open_auth_components(
    settings: Settings,
    accounts: Accounts,
    leases: Leases,
    *,
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    on_login: OnLogin = lambda *_: None,
) -> AsyncIterator[AuthComponents]:
    """Yields the objects for this process and its running event loop. Contacts no token issuer and no OpenID provider.

    - `leases`: limits how many passwords all workers hash at the same time.
    - `clock`: returns seconds since 1970.
    - `monotonic`: returns the seconds of a monotonic clock, for the age of documents from issuers and the provider.
    - `on_login`: is called for each login, successful or not, in order to count it.

    At its end, the `async with` block cancels running verifications and writes the collected entries of the audit log.
    The store must stay open until the block has ended.
    """
    auth, oidc = settings.auth, settings.oidc
    htpasswd = HtpasswdFile(auth.htpasswd) if auth.htpasswd else None
    issuers = Issuers(settings.issuer, accounts, clock, monotonic)
    # A stamp is a hash of the settings of an issuer or of the provider. A login that depends on such settings keeps
    # their stamp. `RevocationCheck` refuses the login if its stamp is not in this list.
    stamps = [*issuers.issuers_by_stamp, *([provider_stamp(oidc)] if oidc.issuer else [])]
    keys, service_name = SigningKeys(accounts, clock), token_service_name(auth, settings.public_url)
    revocation_check = RevocationCheck(accounts, htpasswd, stamps, keys)
    hashing_pool = HashingPool(leases)
    throttle = LoginThrottle(accounts, clock)
    password_check = PasswordCheck(accounts, hashing_pool, throttle, clock, htpasswd)
    audit_buffer = AuditBuffer(accounts, clock)
    login_audit = LoginAudit(accounts, audit_buffer, clock, on_login)
    bearer_tokens = BearerTokens(accounts, keys, service_name, auth.token_ttl, clock)
    login_sessions = LoginSessions(accounts, clock)
    openid_login = None
    if oidc.issuer:
        provider, attempts = OpenIDProvider(oidc, monotonic), LoginAttempts(keys, clock)
        openid_login = OpenIDLogin(
            oidc, accounts, provider, attempts, login_sessions, login_audit, throttle, htpasswd, clock
        )
    verifier = CredentialVerifier(
        accounts, bearer_tokens, issuers, password_check, revocation_check, login_audit, clock
    )
    try:
        yield AuthComponents(
            credential_verifier=verifier,
            bearer_tokens=bearer_tokens,
            login_sessions=login_sessions,
            openid_login=openid_login,
            revocation_check=revocation_check,
            hashing_pool=hashing_pool,
            audit_buffer=audit_buffer,
            refresh_lifetime=auth.refresh_ttl,
            accounts=accounts,
            clock=clock,
            cursors=SealedCursors(keys.secrets),
            htpasswd=htpasswd,
        )
    finally:
        if openid_login is not None:
            await openid_login.aclose()
        await verifier.aclose()
        await password_check.aclose()
        await issuers.aclose()
        await login_sessions.aclose()
        await login_audit.aclose()
        await audit_buffer.aclose()
        hashing_pool.close()
