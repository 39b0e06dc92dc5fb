"""Checks the settings of the OpenID provider when the server starts, and reads the client secret. Defines the errors of
logins at the provider.

Do not import Authlib in this module: the import takes memory and time, and every server imports this module.
"""

from __future__ import annotations

import os
import re
from typing import Final

from registry.auth.external.identity_claims import settings_stamp
from registry.config.auth_settings import OIDCSettings
from registry.small_files import read_small_text

_ERROR_CODE: Final = re.compile(r"[a-z0-9_.-]{1,60}")
"""The form of an error code that may be written to a log."""


class ProviderInvalid(Exception):
    """The settings of the provider cannot be used. The text says why, in one line for the operator. It contains no
    secret."""


class ProviderUnavailable(Exception):
    """A login needs the provider, but the provider sends no usable response, or the client secret cannot be read. The
    text says why, for the log."""


class CodeRefused(Exception):
    """The provider refuses the authorization code of a login, or refuses this registry as a client. `reason` is the
    provider's error code, as `loggable_error_code` returns it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class IDTokenInvalid(Exception):
    """This registry refuses the ID token of a login. The text says why. It is for the log, and must not be shown to the
    person who logs in."""


def check_provider(settings: OIDCSettings) -> None:
    """Checks the settings of the provider. Raises ProviderInvalid if only one of `issuer` and `client_id` is set, or if
    the client secret cannot be read or is empty. Sends no request."""
    if (settings.issuer is None) != (settings.client_id is None):
        missing = "issuer" if settings.issuer is None else "client_id"
        raise ProviderInvalid(f"oidc.{missing} is not set; logins at an OpenID provider need issuer and client_id")
    if settings.issuer is not None:
        read_client_secret(settings)


def read_client_secret(settings: OIDCSettings) -> str | None:
    """Returns the client secret, with which this registry authenticates at the provider. Returns None if the settings
    name no secret (a public client). Reads the secret at each call, so that a changed file takes effect without a
    restart. Raises ProviderInvalid if the secret cannot be read or is empty."""
    if settings.client_secret_env is not None:
        secret, source = os.environ.get(settings.client_secret_env, ""), settings.client_secret_env
    elif settings.client_secret_file is not None:
        source = str(settings.client_secret_file)
        try:
            secret = read_small_text(settings.client_secret_file)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ProviderInvalid(
                f"cannot read the client secret for the OpenID provider from {source}: {reason}"
            ) from None
    else:
        return None
    if not secret.strip():
        raise ProviderInvalid(f"the client secret for the OpenID provider is missing or empty in {source}")
    return secret.strip()


def loggable_error_code(value: object) -> str:
    """Returns `value`, an error code that the provider sent. Returns `unnamed` instead if it is not a text, is too long
    for a log, or has characters that error codes do not have."""
    return value if isinstance(value, str) and _ERROR_CODE.fullmatch(value) else "unnamed"


def provider_stamp(settings: OIDCSettings) -> str:
    """Returns the stamp of the provider's settings: a hash that changes when the settings change. A login at the
    provider stores the stamp in the person's `Identity` (`registry.auth.rights.principal`). After the settings change,
    this registry refuses identities with the old stamp."""
    return settings_stamp("openid", settings)
