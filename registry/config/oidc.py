"""The settings of the login for people at an OpenID provider: `[oidc]`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from registry.config.auth import check_address
from registry.config.upstream import Group

_SCOPES = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+(?: [\x21\x23-\x5b\x5d-\x7e]+)*")
"""RFC 6749, 3.3."""


def _issuer(value: str) -> str:
    check_address(value, "https://sso.example.com/realms/company", "answers for people who log in")
    if "?" in value:
        raise ValueError(f"{value!r} has a query; an issuer has none")
    return value


def _scopes(value: str) -> str:
    if not _SCOPES.fullmatch(value) or "openid" not in value.split(" "):
        raise ValueError(f"{value!r} are no scopes like 'openid profile email'; openid has to be among them")
    return value


class OIDC(Group):
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
