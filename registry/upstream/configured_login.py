"""The login that the settings configure for an upstream. It is read again when its file changes, and never logged."""

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
from storage.errors import UpstreamUnavailable

log = logging.getLogger("registry.upstream")

HUB_NAMES = ("https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io")
"""The names under which docker stores the login for Docker Hub."""


@dataclass(frozen=True, slots=True)
class UpstreamLogin:
    """A user name with a password, or an identity token: a refresh token that `docker login` got from the token service
    instead of storing the password."""

    username: str
    password: str = field(default="", repr=False)
    identity: str = field(default="", repr=False)
    version: str = ""
    """Changes when the file changes. It is part of the key of cached tokens, so that tokens obtained with an earlier
    login are not used."""

    def basic(self) -> str:
        """Returns the `Authorization` value of the Basic scheme (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


class ConfiguredLogin:
    """Reads the login of one upstream: from the settings `username` with `password_file` or `password_env`, or from
    docker's `config.json`."""

    def __init__(self, settings: Upstream) -> None:
        self._settings = settings
        self._file = settings.docker_config or settings.password_file
        self._read_state: tuple[int, int, int] | None = None
        """Modification time, size and inode of the file when it was read."""
        self._login: UpstreamLogin | None = None

    @property
    def is_configured(self) -> bool:
        """Whether the settings configure a login."""
        return self._settings.username is not None or self._settings.docker_config is not None

    def current(self) -> UpstreamLogin | None:
        """Returns the login; None if none is configured, or if docker's `config.json` has none for this upstream.
        Raises UpstreamUnavailable if the login cannot be read; the log says why."""
        if not self.is_configured:
            return None
        if self._file is None:
            return self._from_environment()
        try:
            state = os.stat(self._file)
            file_state = (state.st_mtime_ns, state.st_size, state.st_ino)
            if file_state != self._read_state:
                self._login = self._read(self._file, f"{file_state[0]:x}-{file_state[2]:x}")
                self._read_state = file_state
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            # The text of an OSError or a JSON error shows no content of the file. The text of other errors could.
            reason = error if isinstance(error, OSError | json.JSONDecodeError) else "its content is not valid"
            log.error("the login for %s cannot be read from %s: %s", self._settings.name, self._file, reason)
            raise self._unreadable_error() from None
        return self._login

    def _unreadable_error(self) -> UpstreamUnavailable:
        return UpstreamUnavailable(
            f"the login configured for {self._settings.name} cannot be read; the server's log says why"
        )

    def _from_environment(self) -> UpstreamLogin:
        """Returns the login whose password is in an environment variable. Raises UpstreamUnavailable if it is not
        set."""
        variable = self._settings.password_env
        password = os.environ.get(variable) if variable else ""
        if password is None:
            log.error("the login for %s cannot be read: %s is not set", self._settings.name, variable)
            raise self._unreadable_error()
        return UpstreamLogin(self._settings.username or "", password)

    def _read(self, file: Path, version: str) -> UpstreamLogin | None:
        """Returns the login in `file`, a password file or docker's `config.json`; None if the latter has none."""
        text = file.read_text(encoding="utf-8")
        if self._settings.docker_config is None:
            return UpstreamLogin(self._settings.username or "", text.rstrip("\r\n"), version=version)
        return self._find_docker_login(json.loads(text), version)

    def _find_docker_login(self, document: Mapping[str, object], version: str) -> UpstreamLogin | None:
        """Returns the login for this upstream in docker's `config.json`; None if there is none. Logs a warning then."""
        logins = document.get("auths") or {}
        if not isinstance(logins, Mapping):
            raise TypeError
        for name in self._docker_names():
            if isinstance(entry := logins.get(name), Mapping) and (login := _parse_docker_login(entry, version)):
                return login
        uses_helper = "credsStore" in document or "credHelpers" in document
        log.warning(
            "%s holds no login for %s, so requests to it are sent without a login%s",
            self._settings.docker_config,
            self._settings.name,
            ": it leaves passwords to a credential helper, which Entrepot does not support" if uses_helper else "",
        )
        return None

    def _docker_names(self) -> list[str]:
        """Returns the names under which `config.json` may hold the login, the most likely first."""
        hosts = [self._settings.name, *(urlsplit(endpoint).netloc for endpoint in self._settings.endpoints)]
        names = [*HUB_NAMES] if self._settings.name == DOCKER_HUB else []
        for host in hosts:
            names += [host, f"https://{host}", f"http://{host}", f"https://{host}/v1/", f"https://{host}/v2/"]
        return names


def _parse_docker_login(entry: Mapping[str, object], version: str) -> UpstreamLogin | None:
    """Returns the login in an entry of `auths`; None if the entry is empty. The user name and the password are in
    `auth` (base64 of `name:password`), or in `username` and `password`. Raises ValueError if `auth` cannot be
    decoded."""
    username, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    identity = str(entry.get("identitytoken") or "")
    if auth := entry.get("auth"):
        try:
            decoded = base64.b64decode(str(auth), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise ValueError("not base64") from None
        username, _, password = decoded.partition(":")
        password = password.rstrip("\0")
    if not username and not identity:
        return None
    return UpstreamLogin(username, password, identity, version)
