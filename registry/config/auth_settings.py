"""The settings for logins: `[auth]` (accounts and tokens), `[[issuer]]` (tokens of other services) and `[oidc]` (login
with a browser)."""

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
"""The service name in tokens and challenges if the settings give neither `service` nor `public_url`."""
ASYMMETRIC_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Signature algorithms that use a key pair. With a shared-secret algorithm such as HS256, anyone who knows the public
key could sign tokens."""

_SERVICE = re.compile(r"[A-Za-z0-9._:/-]{1,255}")
_SCOPES = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+(?: [\x21\x23-\x5b\x5d-\x7e]+)*")
"""Scopes, separated by spaces (RFC 6749, section 3.3)."""

# The functions `_check_…` are pydantic validators: they return the value to use, and raise ValueError.


def _check_service(value: str) -> str:
    if not _SERVICE.fullmatch(value):
        raise ValueError(f"{value!r} is not a service name like registry.example.com")
    return value


def check_identity_url(value: str, example: str, attacker_can: str) -> None:
    """Checks the URL of a service on which logins depend. It must be https, or http on this machine, and contain no
    user name. Raises ValueError. `example` is a valid URL for the message. `attacker_can` ends the message about plain
    http: what someone who changes the service's responses can do, such as "can log in"."""
    if "@" in value:  # the message does not repeat the URL, which may contain a password
        raise ValueError("such an address holds no user and no password")
    parts = split_http_url(value, example, fragment=False)
    if parts.scheme == "http" and not is_loopback_host(parts.hostname or ""):
        raise ValueError(f"{value!r} must begin with https://: whoever can change its answers {attacker_can}")


def _check_jwks_url(value: str) -> str:
    check_identity_url(value, "https://ci.example.com/.well-known/jwks", "can log in")
    return value


def _check_algorithm(value: str) -> str:
    if value not in ASYMMETRIC_ALGORITHMS:
        raise ValueError(
            f"{value!r} is not an algorithm for tokens of others; choose from {', '.join(ASYMMETRIC_ALGORITHMS)}"
        )
    return value


def _check_account(value: str) -> str:
    try:
        return AccountName(value)
    except AccountInvalid as error:
        raise ValueError(error.message) from None


def _as_list(value: Any) -> Any:
    """Returns a list for a single claim value. Returns any other value unchanged, so that pydantic checks it."""
    return [value] if isinstance(value, str) else value


class AuthSettings(SettingsGroup):
    """How accounts log in. `entrepot user` and `entrepot robot` add accounts."""

    htpasswd: Path | None = Field(
        default=None,
        description="File with further accounts, one NAME:HASH per line with bcrypt hashes, as `htpasswd -B` writes it",
    )
    service: Annotated[str, AfterValidator(_check_service)] | None = Field(
        default=None,
        description="The service name in tokens and challenges. Default: the host of `public_url`, otherwise "
        f"`{DEFAULT_SERVICE}`",
    )
    token_ttl: Duration = Field(
        default=300.0,
        ge=60,
        le=3600,
        description="How long a token of `/token` is valid, from 1m to 1h. Clients get a new one by themselves",
    )
    refresh_ttl: Duration = Field(
        default=7776000.0, gt=0, description="How long `docker login` lasts for clients that do not store the password"
    )


class Issuer(SettingsGroup):
    """An outside service whose tokens (JWTs) are accepted as a password or as a bearer token, such as a CI that gives
    each job a token. A token logs in by the first table whose issuer, audience and required claims match it."""

    issuer: str = Field(min_length=1, description="The exact `iss` claim of its tokens")
    audience: str = Field(
        min_length=1, description="The `aud` claim of its tokens. It must name this registry and no other service"
    )
    jwks_url: Annotated[str, AfterValidator(_check_jwks_url)] | None = Field(
        default=None, description="URL of its public keys: https, or http on this machine. Fetched when they are needed"
    )
    jwks_file: Path | None = Field(default=None, description="File with its public keys, instead of `jwks_url`")
    ca_file: Path | None = Field(
        default=None, description="Certificate authorities to trust instead of the system's, in PEM"
    )
    algorithms: list[Annotated[str, AfterValidator(_check_algorithm)]] = Field(
        default=["RS256", "ES256"], min_length=1, description="Signature algorithms that are accepted"
    )
    account: Annotated[str, AfterValidator(_check_account)] | None = Field(
        default=None, description="The robot that all its tokens log in as"
    )
    account_claim: str | None = Field(
        default=None, min_length=1, description="The claim that names the robot, such as `sub`, instead of `account`"
    )
    required: dict[str, Annotated[list[str], BeforeValidator(_as_list)]] = Field(
        default={},
        description="Claims that a token must have, each with its value or a list of allowed values: "
        '`{ repository_owner = "team", ref = ["refs/heads/main"] }`',
    )
    groups_claim: str | None = Field(
        default=None,
        min_length=1,
        description="The claim with groups that the robot is a member of while it uses this token",
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
    """Returns the service name in tokens and challenges: the setting `service`, the host of `public_url`, or
    DEFAULT_SERVICE. It never depends on a request."""
    return auth.service or urlsplit(public_url or "").netloc or DEFAULT_SERVICE


def has_external_logins(auth: AuthSettings, issuers: Sequence[Issuer], provider: str | None) -> bool:
    """Returns whether the settings configure logins outside the metadata store: an htpasswd file, issuers of tokens, or
    an OpenID provider. Then the registry requires a login even if it has no accounts. `provider` is the URL of the
    OpenID provider; None if there is none."""
    return auth.htpasswd is not None or bool(issuers) or provider is not None


def _check_issuer(value: str) -> str:
    check_identity_url(value, "https://sso.example.com/realms/company", "decides who has logged in")
    if "?" in value:
        raise ValueError(f"{value!r} has a query; an issuer has none")
    return value


def _check_scopes(value: str) -> str:
    if not _SCOPES.fullmatch(value) or "openid" not in value.split(" "):
        raise ValueError(f"{value!r} is not a list of scopes like 'openid profile email'; openid has to be among them")
    return value


class OIDCSettings(SettingsGroup):
    """Login with a browser at `/login`, through an OpenID provider such as Keycloak, Authentik, Entra or Okta. It is
    for `/api/v1` and the pages; docker logs in with a password or an API token."""

    issuer: Annotated[str, AfterValidator(_check_issuer)] | None = Field(
        default=None,
        description="The provider's URL, exactly as in the `iss` claim of its tokens: https, or http on this machine. "
        "Without it there is no browser login",
    )
    client_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=255,
        description="The client id of this registry at the provider. Its redirect URI there is `/login/callback`",
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
        description="The claim of the ID token with the account's name, unchanged. Choose one that people cannot edit",
    )
    groups_claim: str | None = Field(
        default=None,
        min_length=1,
        description="The claim that lists further groups of this registry that the person belongs to",
    )
    create: bool = Field(
        default=False, description="Add the account at the first login. Otherwise only existing accounts can log in"
    )

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if self.client_secret_file is not None and self.client_secret_env is not None:
            raise ValueError("oidc takes client_secret_file or client_secret_env, and not both")
        return self
