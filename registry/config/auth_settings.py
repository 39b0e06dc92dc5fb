"""The settings for logins: the table `[auth]` of the settings file (accounts and tokens), any number of tables
`[[issuer]]` (tokens of other services; each table makes one `Issuer`), and the table `[oidc]` (login with a browser).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from registry.client_addresses import is_loopback_host
from registry.config.field_types import Duration, SettingsGroup, split_http_url
from storage.access import AccountInvalid, AccountName

DEFAULT_SERVICE = "entrepot"
"""The name of this registry in tokens and challenges if neither `service` nor `public_url` is set."""
ASYMMETRIC_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""The signature algorithms that tokens of other issuers may have. All of them use a key pair. With an algorithm that
uses a shared secret, such as HS256, an attacker could sign tokens with the issuer's public key as the secret."""

_SERVICE = re.compile(r"[A-Za-z0-9._:/-]{1,255}")
"""The characters and the length of a service name."""
_SCOPES = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+(?: [\x21\x23-\x5b\x5d-\x7e]+)*")
"""Scopes, separated by spaces (RFC 6749, section 3.3)."""

# The functions `_check_…` are pydantic validators: they return the value to use, and raise ValueError.


def _check_service(value: str) -> str:
    if not _SERVICE.fullmatch(value):
        raise ValueError(f"{value!r} is not a service name like registry.example.com")
    return value


def check_identity_url(value: str, example: str, attacker_can: str) -> None:
    """Checks the URL of a service on which logins depend, such as an OpenID provider. Raises ValueError unless the URL
    has https, or http on this machine, and has no user name, password or fragment.

    `example`: a valid URL for the message. `attacker_can`: what an attacker can do if the URL has plain http. It ends
    the message that refuses plain http. For example, `log in` ends the message "…, an attacker … can log in"."""
    if "@" in value:  # the message does not repeat the URL, which may contain a password
        raise ValueError("the URL must not contain a user name or password")
    parts = split_http_url(value, example, allow_fragment=False)
    if parts.scheme == "http" and not is_loopback_host(parts.hostname or ""):
        raise ValueError(
            f"{value!r} must begin with https://: with plain http, an attacker who can change the responses in transit "
            f"can {attacker_can}"
        )


def _check_jwks_url(value: str) -> str:
    check_identity_url(value, "https://ci.example.com/.well-known/jwks", attacker_can="log in")
    return value


def _check_algorithm(value: str) -> str:
    if value not in ASYMMETRIC_ALGORITHMS:
        raise ValueError(
            f"{value!r} is not an accepted signature algorithm; choose from {', '.join(ASYMMETRIC_ALGORITHMS)}"
        )
    return value


def _check_account(value: str) -> str:
    try:
        return AccountName(value)
    except AccountInvalid as error:
        raise ValueError(error.message) from None


def _as_list(value: Any) -> Any:
    """Returns a list with `value` as its only entry if `value` is text. Otherwise returns `value`, which pydantic then
    checks."""
    return [value] if isinstance(value, str) else value


class AuthSettings(SettingsGroup):
    """How accounts log in. `entrepot user` and `entrepot robot` add accounts."""

    htpasswd: Path | None = Field(
        default=None,
        description="File with further accounts, one NAME:HASH per line with bcrypt hashes, as `htpasswd -B` writes it",
    )
    service: Annotated[str, AfterValidator(_check_service)] | None = Field(
        default=None,
        description="The service name in tokens and challenges. Default: host and port of `public_url`; "
        f"`{DEFAULT_SERVICE}` if that is not set",
    )
    token_ttl: Duration = Field(
        default=300.0,
        ge=60,
        le=3600,
        description="How long a token of `/token` is valid, from 1m to 1h. Clients get a new one by themselves",
    )
    refresh_ttl: Duration = Field(
        default=7776000.0,
        gt=0,
        description="How long `docker login` lasts for clients that store a refresh token instead of the password",
    )


class Issuer(SettingsGroup):
    """An outside service whose tokens (JWTs) are accepted as a password or as a bearer token, such as a CI that gives
    each job a token. Each token uses the first table whose issuer, audience and required claims match."""

    issuer: str = Field(min_length=1, description="The exact `iss` claim of its tokens")
    audience: str = Field(
        min_length=1, description="The `aud` claim of its tokens. It must name this registry and no other service"
    )
    jwks_url: Annotated[str, AfterValidator(_check_jwks_url)] | None = Field(
        default=None,
        description="URL of its public keys: https, or http on this machine. The keys are fetched when they are needed",
    )
    jwks_file: Path | None = Field(default=None, description="File with its public keys, instead of `jwks_url`")
    ca_file: Path | None = Field(
        default=None, description="Certificate authorities to trust instead of the system's, in PEM"
    )
    algorithms: list[Annotated[str, AfterValidator(_check_algorithm)]] = Field(
        default=["RS256", "ES256"], min_length=1, description="Signature algorithms that are accepted"
    )
    account: Annotated[str, AfterValidator(_check_account)] | None = Field(
        default=None, description="The robot account that all its tokens log in to"
    )
    account_claim: str | None = Field(
        default=None,
        min_length=1,
        description="The claim that names the robot account, such as `sub`, instead of `account`",
    )
    required: dict[str, Annotated[list[str], BeforeValidator(_as_list)]] = Field(
        default={},
        description="Claims that a token must have, each with its value or a list of allowed values: "
        '`{ repository_owner = "team", ref = ["refs/heads/main"] }`',
    )
    groups_claim: str | None = Field(
        default=None,
        min_length=1,
        description="The claim that lists the groups to which the robot belongs while it uses this token",
    )

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if (self.jwks_url is None) == (self.jwks_file is None):
            raise ValueError(f"issuer {self.issuer!r} needs jwks_url or jwks_file, and not both")
        if (self.account is None) == (self.account_claim is None):
            raise ValueError(f"issuer {self.issuer!r} needs account or account_claim, and not both")
        if self.ca_file is not None and self.jwks_url is None:
            raise ValueError(f"issuer {self.issuer!r} has a ca_file, but no jwks_url to use it for")
        return self


def token_service_name(auth: AuthSettings, public_url: str | None) -> str:
    """Returns the name of this registry in tokens and challenges: the first that is set of `service`, the host and port
    of `public_url`, and DEFAULT_SERVICE. The name never depends on a request's `Host` header."""
    return auth.service or urlsplit(public_url or "").netloc or DEFAULT_SERVICE


def has_external_logins(auth: AuthSettings, issuers: Sequence[Issuer], provider: str | None) -> bool:
    """Returns whether the settings configure logins outside the metadata store: an htpasswd file, issuers of tokens, or
    an OpenID provider. With such logins, the registry requires a login even if the metadata store has no accounts.
    `provider`: the URL of the OpenID provider; None if the settings have no provider."""
    return auth.htpasswd is not None or bool(issuers) or provider is not None


def _check_issuer(value: str) -> str:
    check_identity_url(value, "https://sso.example.com/realms/company", attacker_can="decide who has logged in")
    if "?" in value:
        raise ValueError(f"{value!r} has a query; an issuer has none")
    return value


def _check_scopes(value: str) -> str:
    if not _SCOPES.fullmatch(value) or "openid" not in value.split(" "):
        raise ValueError(f"{value!r} is not a list of scopes like 'openid profile email'; openid has to be among them")
    return value


class OIDCSettings(SettingsGroup):
    """Login with a browser at `/login`, through an OpenID provider such as Keycloak, Authentik, Entra or Okta. This
    login is for `/api/v1` and the pages; docker logs in with a password or an API token."""

    issuer: Annotated[str, AfterValidator(_check_issuer)] | None = Field(
        default=None,
        description="The provider's URL, exactly as in the `iss` claim of its tokens: https, or http on this machine. "
        "Without it, people log in with the password of their account only",
    )
    client_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=255,
        description="The client id of this registry at the provider. The redirect URI to register there is "
        "`/login/callback` at the address of this registry",
    )
    client_secret_file: Path | None = Field(
        default=None, description="File with the client secret and nothing else. A public client has no secret"
    )
    client_secret_env: str | None = Field(
        default=None, min_length=1, description="Environment variable with the client secret"
    )
    ca_file: Path | None = Field(
        default=None, description="Certificate authorities to trust instead of the system's, in PEM"
    )
    scopes: Annotated[str, AfterValidator(_check_scopes)] = Field(
        default="openid profile email", description="The scopes that are requested from the provider"
    )
    account_claim: str = Field(
        default="preferred_username",
        min_length=1,
        description="The claim of the ID token that is the account's name. Choose one that people cannot edit",
    )
    groups_claim: str | None = Field(
        default=None,
        min_length=1,
        description="The claim that lists further groups of this registry that the person belongs to",
    )
    create: bool = Field(
        default=False, description="Add the account at a person's first login. If false, only existing accounts log in"
    )

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if self.client_secret_file is not None and self.client_secret_env is not None:
            raise ValueError("oidc takes client_secret_file or client_secret_env, and not both")
        return self
