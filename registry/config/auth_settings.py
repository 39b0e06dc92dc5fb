"""The settings of who may log in, and how: `[auth]` and `[[issuer]]`.

The settings of the login for people at an OpenID provider: `[oidc]`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from registry.client_addresses import is_loopback_host
from registry.config.field_types import Duration
from registry.config.mirror_settings import SettingsGroup
from storage.access import AccountInvalid, AccountName

DEFAULT_SERVICE = "entrepot"
ASYMMETRIC_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Algorithms with a public key. One with a shared secret (HS256) would let whoever knows the public key sign."""

_SERVICE = re.compile(r"[A-Za-z0-9._:/-]{1,255}")


def _service(value: str) -> str:
    if not _SERVICE.fullmatch(value):
        raise ValueError(f"{value!r} is not a service's name like registry.example.com")
    return value


def check_identity_url(value: str, example: str, power: str) -> None:
    """Of something outside that is asked who somebody is: https, or http on this machine. Raises ValueError, which
    says what whoever changes its answers on their way can do: `power`."""
    if "@" in value:  # not shown again: it may be a password
        raise ValueError("such an address holds no user and no password")
    try:
        parts = urlsplit(value)
        known = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if not known or parts.fragment or parts.scheme not in ("http", "https"):
        raise ValueError(f"{value!r} is not an address like {example}")
    if parts.scheme == "http" and not is_loopback_host(parts.hostname or ""):
        raise ValueError(f"{value!r} must begin with https://: whoever can change what comes from there {power}")


def _jwks_url(value: str) -> str:
    check_identity_url(value, "https://ci.example.com/.well-known/jwks", "can log in")
    return value


def _algorithm(value: str) -> str:
    if value not in ASYMMETRIC_ALGORITHMS:
        raise ValueError(
            f"{value!r} is not an algorithm for tokens of others; there are {', '.join(ASYMMETRIC_ALGORITHMS)}"
        )
    return value


def _account(value: str) -> str:
    try:
        return AccountName(value)
    except AccountInvalid as error:
        raise ValueError(error.message) from None


def _values(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class AuthSettings(SettingsGroup):
    """Who may log in, and how. Accounts are made with `entrepot user` and `entrepot robot`."""

    htpasswd: Path | None = Field(
        default=None, description="File of further accounts, NAME:HASH with bcrypt, as `htpasswd -B` writes it"
    )
    service: Annotated[str, AfterValidator(_service)] | None = Field(
        default=None,
        description="What tokens are made for, as clients are told; "
        f"without it `public_url`'s host, or `{DEFAULT_SERVICE}`",
    )
    token_ttl: Duration = Field(
        default=300.0, ge=60, le=3600, description="How long a token of `/token` lives, 1m to 1h; clients get a new one"
    )
    refresh_ttl: Duration = Field(
        default=7776000.0, gt=0, description="How long `docker login` lasts, for clients that keep no password"
    )


class Issuer(SettingsGroup):
    """Somebody else whose tokens (JWTs) are taken in place of a password or as a bearer token, such as those that a CI
    gives its jobs. The first table whose issuer, audience and required claims fit a token is the one that counts."""

    issuer: str = Field(min_length=1, description="What its tokens have as `iss`, exactly")
    audience: str = Field(min_length=1, description="What they must have as `aud`: this registry, not another service")
    jwks_url: Annotated[str, AfterValidator(_jwks_url)] | None = Field(
        default=None, description="Where its public keys are; https, or http on this machine. Asked when needed"
    )
    jwks_file: Path | None = Field(default=None, description="File with its public keys, in place of `jwks_url`")
    ca_file: Path | None = Field(default=None, description="Certificates to trust instead of the system's, PEM")
    algorithms: list[Annotated[str, AfterValidator(_algorithm)]] = Field(
        default=["RS256", "ES256"], min_length=1, description="How its tokens may be signed"
    )
    account: Annotated[str, AfterValidator(_account)] | None = Field(
        default=None, description="The robot that all its tokens log in as"
    )
    account_claim: str | None = Field(
        default=None, min_length=1, description="Or the claim that names the robot, such as `sub`"
    )
    required: dict[str, Annotated[list[str], BeforeValidator(_values)]] = Field(
        default={},
        description="Claims that must have that value, or one of those: "
        '`{ repository_owner = "team", ref = ["refs/heads/main"] }`',
    )
    groups_claim: str | None = Field(
        default=None, min_length=1, description="The claim that lists groups the robot is in for this token"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.jwks_url is None) == (self.jwks_file is None):
            raise ValueError(f"issuer {self.issuer!r} needs jwks_url or jwks_file, and not both")
        if (self.account is None) == (self.account_claim is None):
            raise ValueError(f"issuer {self.issuer!r} needs account or account_claim, and not both")
        if self.ca_file is not None and self.jwks_url is None:
            raise ValueError(f"issuer {self.issuer!r} has a ca_file, but nothing is fetched")
        return self


def token_service_name(auth: AuthSettings, public_url: str | None) -> str:
    """For whom tokens are made. It never depends on what a request says."""
    return auth.service or urlsplit(public_url or "").netloc or DEFAULT_SERVICE


def has_external_logins(auth: AuthSettings, issuers: Sequence[Issuer], provider: str | None) -> bool:
    """Whether the settings name somebody who can log in, so that the registry is not open to everybody. `provider`:
    the OpenID provider's issuer, if there is one."""
    return auth.htpasswd is not None or bool(issuers) or provider is not None


_SCOPES = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+(?: [\x21\x23-\x5b\x5d-\x7e]+)*")
"""RFC 6749, 3.3."""


def _issuer(value: str) -> str:
    check_identity_url(value, "https://sso.example.com/realms/company", "answers for people who log in")
    if "?" in value:
        raise ValueError(f"{value!r} has a query; an issuer has none")
    return value


def _scopes(value: str) -> str:
    if not _SCOPES.fullmatch(value) or "openid" not in value.split(" "):
        raise ValueError(f"{value!r} are no scopes like 'openid profile email'; openid has to be among them")
    return value


class OIDCSettings(SettingsGroup):
    """Where people log in with a browser, at `/login`: an OpenID provider (Keycloak, Authentik, Entra, Okta and the
    like). For `/api/v1` and the pages; docker logs in with a password or an API token."""

    issuer: Annotated[str, AfterValidator(_issuer)] | None = Field(
        default=None,
        description="The provider, exactly as its tokens have it in `iss`; https, or http on this machine. Without it "
        "there is no such login",
    )
    client_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=255,
        description="What this registry is called at the provider, with `/login/callback` as its redirect URI",
    )
    client_secret_file: Path | None = Field(
        default=None, description="File that holds the client's secret, and nothing else; a public client has none"
    )
    client_secret_env: str | None = Field(
        default=None, min_length=1, description="Environment variable that holds the client's secret"
    )
    ca_file: Path | None = Field(default=None, description="Certificates to trust instead of the system's, PEM")
    scopes: Annotated[str, AfterValidator(_scopes)] = Field(
        default="openid profile email", description="What the provider is asked for"
    )
    account_claim: str = Field(
        default="preferred_username",
        min_length=1,
        description="The claim of its ID token that is the account's name, as it is; one that people cannot change",
    )
    groups_claim: str | None = Field(
        default=None, min_length=1, description="The claim that lists groups of this store the person is in as well"
    )
    create: bool = Field(
        default=False, description="Add the account at the first login; without it, it has to be there"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.client_secret_file is not None and self.client_secret_env is not None:
            raise ValueError("oidc takes client_secret_file or client_secret_env, and not both")
        return self
