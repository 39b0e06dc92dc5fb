"""The login configured for an upstream. Read again when its file changes; never logged."""

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
    """A username with a password, or an identity token that `docker login` got from the token service."""

    username: str
    password: str = field(default="", repr=False)
    identity: str = field(default="", repr=False)
    version: str = ""
    """Changes with the file, so that tokens obtained with another login are not used."""

    def basic(self) -> str:
        """Returns the `Authorization` value of the Basic scheme (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


class ConfiguredLogin:
    """Reads the login: username with password_file or password_env, or docker's `config.json`."""

    def __init__(self, settings: Upstream) -> None:
        self._settings = settings
        self._file = settings.docker_config or settings.password_file
        self._seen: tuple[int, int, int] | None = None
        self._login: UpstreamLogin | None = None

    @property
    def configured(self) -> bool:
        return self._settings.username is not None or self._settings.docker_config is not None

    def current(self) -> UpstreamLogin | None:
        """Returns the login; None: none is configured, or the file holds none. Raises UpstreamUnavailable if it cannot
        be read; the log says why."""
        if not self.configured:
            return None
        if self._file is None:
            return self._from_environment()
        try:
            state = os.stat(self._file)
            seen = (state.st_mtime_ns, state.st_size, state.st_ino)
            if seen != self._seen:
                self._login = self._read(self._file, f"{seen[0]:x}-{seen[2]:x}")
                self._seen = seen
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            # The text of a JSON error shows no content of the file; the text of other errors could.
            reason = error if isinstance(error, OSError | json.JSONDecodeError) else "it is not what it should be"
            log.error("the login for %s cannot be read from %s: %s", self._settings.name, self._file, reason)
            raise self._unreadable() from None
        return self._login

    def _unreadable(self) -> UpstreamUnavailable:
        return UpstreamUnavailable(
            f"the login configured for {self._settings.name} cannot be read; the server's log says why"
        )

    def _from_environment(self) -> UpstreamLogin:
        variable = self._settings.password_env
        password = os.environ.get(variable) if variable else ""
        if password is None:
            log.error("the login for %s cannot be read: %s is not set", self._settings.name, variable)
            raise self._unreadable()
        return UpstreamLogin(self._settings.username or "", password)

    def _read(self, file: Path, version: str) -> UpstreamLogin | None:
        text = file.read_text(encoding="utf-8")
        if self._settings.docker_config is None:
            return UpstreamLogin(self._settings.username or "", text.rstrip("\r\n"), version=version)
        return self._from_docker(json.loads(text), version)

    def _from_docker(self, document: Mapping[str, object], version: str) -> UpstreamLogin | None:
        logins = document.get("auths") or {}
        if not isinstance(logins, Mapping):
            raise TypeError
        for name in self._docker_names():
            if isinstance(entry := logins.get(name), Mapping) and (login := _docker_login(entry, version)):
                return login
        kept = "credsStore" in document or "credHelpers" in document
        log.warning(
            "%s holds no login for %s, so nobody logs in there%s",
            self._settings.docker_config,
            self._settings.name,
            ": it leaves passwords to a credential helper, and those are not asked" if kept else "",
        )
        return None

    def _docker_names(self) -> list[str]:
        hosts = [self._settings.name, *(urlsplit(endpoint).netloc for endpoint in self._settings.endpoints)]
        names = [*HUB_NAMES] if self._settings.name == DOCKER_HUB else []
        for host in hosts:
            names += [host, f"https://{host}", f"http://{host}", f"https://{host}/v1/", f"https://{host}/v2/"]
        return names


def _docker_login(entry: Mapping[str, object], version: str) -> UpstreamLogin | None:
    """Parses an entry of `auths`: `auth` is base64 of `name:password`; `username` and `password` may be given
    instead."""
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
