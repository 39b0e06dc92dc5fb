"""Tells an import over the network how to reach the *old registry*, whose content it imports (`RemoteOptions`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import ValidationError

from registry.config import Upstream
from storage.imports import ImportInvalid

IDLE_TIMEOUT_SECONDS: Final = 60.0
"""A request fails if no byte arrives for this time. It is longer than the default for mirrors, because no client
waits for the import."""


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """How to reach the old registry. `password_env`: the environment variable with the password of `username`.
    `ca_file`: a file with the certificate authorities to trust instead of the system's. `insecure`: whether to accept
    every certificate. `jobs`: how many images are imported at the same time."""

    url: str
    username: str | None = None
    password_env: str | None = None
    ca_file: str | None = None
    insecure: bool = False
    jobs: int = 4

    def find_configured(self, configured: Iterable[Upstream]) -> Upstream | None:
        """Returns the upstream in the settings that has `url` as an endpoint; None if there is none. An upstream is a
        registry that this registry mirrors, and its endpoints are its URLs. If several upstreams have this endpoint,
        returns the last of them. `configured`: the upstreams in the settings."""
        matches = [upstream for upstream in configured if self.url.rstrip("/") in upstream.endpoints]
        return matches[-1] if matches else None

    def configured_name(self, configured: Iterable[Upstream]) -> str | None:
        """Returns the name of the upstream in the settings that `find_configured` finds, such as `docker.io`. The HTTP
        client uses this name to find the upstream's login in docker's `config.json`. It may send the upstream's login
        to token services in the domain of this name. Returns None in these cases:

        - `find_configured` finds no upstream.
        - `username` is set. The client must not send the password of `username` to token services in the domain of the
          upstream's name."""
        found = None if self.username is not None else self.find_configured(configured)
        return None if found is None else found.name

    def to_upstream(self, configured: Iterable[Upstream] = ()) -> Upstream:
        """Returns the old registry as an upstream for the HTTP client. Raises ImportInvalid if an option is not valid.

        `configured`: the upstreams in the settings. If the old registry is one of them, the result has its login and
        other settings, but the options of the import take precedence. The name, the endpoint, the number of connections
        and the idle timeout are never those in the settings."""
        host = urlsplit(self.url).netloc.rpartition("@")[2].lower()
        values: dict[str, Any] = {}
        if (found := self.find_configured(configured)) is not None:
            values = found.model_dump(exclude_unset=True)
        if self.username is not None:
            for name in ("password_file", "docker_config"):
                values.pop(name, None)
            values |= {"username": self.username, "password_env": self.password_env}
        if self.ca_file is not None:
            values["ca_file"] = Path(self.ca_file)
        values |= {
            # 100 characters and 64 connections are the limits of these settings.
            "name": "-".join(["import", *re.findall(r"[a-z0-9]+", host)])[:100].rstrip("-"),
            "endpoints": [self.url],
            "connections": min(max(2 * self.jobs, 4), 64),
            "idle_timeout": IDLE_TIMEOUT_SECONDS,
        }
        try:
            return Upstream.model_validate(values)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ImportInvalid(f"the old registry cannot be reached with these options: {reason}") from None
