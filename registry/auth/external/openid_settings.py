"""Checks the settings of the OpenID provider when the server starts, and reads the client secret. Also defines the
errors of logins at the provider.

This module does not import the library Authlib, which takes memory and time to import. A server without a provider
does not need it (see `registry.auth.external.openid_protocol`).
"""

from __future__ import annotations

import os
import re
from typing import Final

from registry.auth.external.identity_claims import settings_stamp
from registry.config.auth_settings import OIDCSettings
from registry.small_files import read_small_text

_ERROR_CODE: Final = re.compile(r"[a-z0-9_.-]{1,60}")
"""The error codes of the provider that may be written to a log."""


class ProviderInvalid(Exception):
    """The settings of the provider cannot be used. The text says why, in one line for the operator. It contains no
    secret."""


class ProviderUnavailable(Exception):
    """A login needs the provider, but the provider sends no usable response, or the client secret cannot be read. The
    text says why, for the log."""


class CodeRefused(Exception):
    """The provider refuses an authorization code or the client. `reason` is the provider's error code, as
    `loggable_error_code` returns it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class IDTokenInvalid(Exception):
    """The ID token is refused. The text says why, for the log and not for the person who logs in."""


def check_provider(settings: OIDCSettings) -> None:
    """Checks that the settings of the provider are complete, and that the client secret can be read. The server calls
    this when it starts. Sends no request. Raises ProviderInvalid if a check fails."""
    if (settings.issuer is None) != (settings.client_id is None):
        missing = "issuer" if settings.issuer is None else "client_id"
        raise ProviderInvalid(f"oidc.{missing} is not set; logins at an OpenID provider need issuer and client_id")
    if settings.issuer is not None:
        read_client_secret(settings)


def read_client_secret(settings: OIDCSettings) -> str | None:
    """Returns the client secret with which this registry authenticates at the provider, or None if the settings name no
    secret (a public client). Reads the secret at each call, so that a changed file takes effect without a restart.
    Raises ProviderInvalid if the secret cannot be read or is empty."""
    if settings.client_secret_env is not None:
        secret, source = os.environ.get(settings.client_secret_env, ""), settings.client_secret_env
    elif settings.client_secret_file is not None:
        source = str(settings.client_secret_file)
        try:
            secret = read_small_text(settings.client_secret_file)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ProviderInvalid(
                "cannot read the client's secret, which this registry sends to the OpenID provider, "
                f"from {source}: {reason}"
            ) from None
    else:
        return None
    if not secret.strip():
        raise ProviderInvalid(
            f"the client's secret, which this registry sends to the OpenID provider, is not in {source}, or is empty"
        )
    return secret.strip()


def loggable_error_code(value: object) -> str:
    """Returns `value`, an error code that the provider sent. Returns `unnamed` instead if it is not a text, is too long
    for a log, or has characters that error codes do not have."""
    return value if isinstance(value, str) and _ERROR_CODE.fullmatch(value) else "unnamed"


def provider_stamp(settings: OIDCSettings) -> str:
    """Returns the stamp of the provider's settings: a hash that changes when the settings change. The `Identity`
    (`registry.auth.rights.principal`) that a login at the provider proves contains the stamp. After a change of the
    settings, identities with the old stamp are refused."""
    return settings_stamp("openid", settings)
