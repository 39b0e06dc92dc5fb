"""The login that the settings configure for an upstream (`ConfiguredLogin`). A login from a file is read again when the
file changes. No password is ever logged."""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from registry.config import DOCKER_HUB, Upstream
from registry.small_files import read_small_text
from storage.errors import UpstreamUnavailable

log = logging.getLogger("registry.upstream")

HUB_AUTHS_KEYS = ("https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io")
"""The keys of `auths` in docker's `config.json` under which the login for Docker Hub may be stored."""


@dataclass(frozen=True, slots=True)
class UpstreamLogin:
    """A login at an upstream: a user name with a password, or an identity token. An identity token is a refresh token:
    `docker login` gets it from the token service and stores it in place of the password."""

    username: str
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    """Empty for a login with a password."""
    version: str = ""
    """A text that changes when the login's file changes; empty for a password from an environment variable. The key of
    a cached token contains this version, so that a new login does not use tokens of an earlier login."""

    def basic_authorization(self) -> str:
        """Returns the value of an `Authorization` header with the user name and the password (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


class ConfiguredLogin:
    """Reads the login of one upstream: from the settings `username` with `password_file` or `password_env`, or from
    docker's `config.json`."""

    def __init__(self, settings: Upstream, configured_name: str | None = None) -> None:
        """`configured_name`: the name under which docker's `config.json` has the login; None: `settings.name`. Only an
        *import*, which copies another registry's content into this one, passes `configured_name`: the settings that an
        import makes for the other registry have a made-up name."""
        self._settings = settings
        self._configured_name = configured_name or settings.name
        self._file = settings.docker_config or settings.password_file
        self._state_when_read: tuple[int, int, int] | None = None
        """Modification time, size and inode of the file when it was last read; None before the first read."""
        self._login: UpstreamLogin | None = None
        """The login that was last read from the file; None before the first read, or if the file has no login for this
        upstream."""

    @property
    def is_configured(self) -> bool:
        """Whether the settings configure a login."""
        return self._settings.username is not None or self._settings.docker_config is not None

    def current(self) -> UpstreamLogin | None:
        """Returns the login; None if the settings configure no login, or if docker's `config.json` has no login for
        this upstream. Reads the file if the file has changed. Raises UpstreamUnavailable if the login cannot be read;
        the log says why."""
        if not self.is_configured:
            return None
        if self._file is None:
            return self._from_environment()
        try:
            status = os.stat(self._file)
            file_state = (status.st_mtime_ns, status.st_size, status.st_ino)
            if file_state != self._state_when_read:
                self._login = self._read_file(self._file, f"{file_state[0]:x}-{file_state[2]:x}")
                self._state_when_read = file_state
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            # Only the text of an OSError or a JSONDecodeError is logged. The text of other errors could contain the
            # password.
            reason = error if isinstance(error, OSError | json.JSONDecodeError) else "its content is not valid"
            log.error("the login for %s cannot be read from %s: %s", self._settings.name, self._file, reason)
            raise self._unreadable_error() from None
        return self._login

    def _unreadable_error(self) -> UpstreamUnavailable:
        """Returns the error for a login that cannot be read. Log the reason first."""
        return UpstreamUnavailable(
            f"the login configured for {self._settings.name} cannot be read; the server's log says why"
        )

    def _from_environment(self) -> UpstreamLogin:
        """Returns the login whose password is in an environment variable. Raises UpstreamUnavailable if the variable is
        not set."""
        variable = self._settings.password_env
        password = os.environ.get(variable) if variable else ""
        if password is None:
            log.error("the login for %s cannot be read: %s is not set", self._settings.name, variable)
            raise self._unreadable_error()
        return UpstreamLogin(self._settings.username or "", password)

    def _read_file(self, file: Path, version: str) -> UpstreamLogin | None:
        """Returns the login in `file`, a password file or docker's `config.json`. Returns None for a `config.json`
        without a login for this upstream. `version`: the version of the returned login."""
        content = read_small_text(file)
        if self._settings.docker_config is None:
            return UpstreamLogin(self._settings.username or "", content.rstrip("\r\n"), version=version)
        return self._find_docker_login(json.loads(content), version)

    def _find_docker_login(self, document: Mapping[str, object], version: str) -> UpstreamLogin | None:
        """Returns the login for this upstream in docker's `config.json`. If there is none, logs a warning and returns
        None."""
        logins = document.get("auths") or {}
        if not isinstance(logins, Mapping):
            raise TypeError
        for key in self._auths_keys():
            if isinstance(entry := logins.get(key), Mapping) and (login := _parse_docker_login(entry, version)):
                return login
        hint = ""
        if "credsStore" in document or "credHelpers" in document:
            hint = "; the file leaves passwords to a credential helper, which Entrepot does not support"
        log.warning(
            "%s contains no login for %s, so requests to that upstream are sent without a login%s",
            self._settings.docker_config,
            self._settings.name,
            hint,
        )
        return None

    def _auths_keys(self) -> list[str]:
        """Returns the keys of `auths` under which the login may be stored, in the order in which to look for it."""
        hosts = [self._configured_name, *(urlsplit(endpoint).netloc for endpoint in self._settings.endpoints)]
        keys = [*HUB_AUTHS_KEYS] if self._configured_name == DOCKER_HUB else []
        for host in hosts:
            keys += [host, f"https://{host}", f"http://{host}", f"https://{host}/v1/", f"https://{host}/v2/"]
        return keys


def _parse_docker_login(entry: Mapping[str, object], version: str) -> UpstreamLogin | None:
    """Returns the login in an entry of `auths`; None if the entry has neither a user name nor an identity token. The
    user name and the password come from `auth` (base64 of `name:password`). If the entry has no `auth`, they come from
    `username` and `password`. Raises ValueError if `auth` cannot be decoded."""
    username, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    identity = str(entry.get("identitytoken") or "")
    if auth := entry.get("auth"):
        try:
            decoded = base64.b64decode(str(auth), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise ValueError("not base64") from None
        username, _, password = decoded.partition(":")
        password = password.rstrip("\0")  # docker removes NUL characters at the end as well
    if not username and not identity:
        return None
    return UpstreamLogin(username, password, identity, version)
