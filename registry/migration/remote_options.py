"""The options of an import over the network (`RemoteOptions`). The *old registry* is the registry whose content is
imported. An *upstream* is a registry that this registry mirrors. Its *endpoints* are its URLs."""

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
"""A request fails if no byte arrives for this time. It is longer than the default for mirrors, because no client waits
for the import."""


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """How to reach the old registry.

    - `password_env`: the environment variable with the password of `username`.
    - `ca_file`: a file with certificate authorities. It replaces the system's certificate authorities.
    - `insecure`: whether to accept every certificate.
    - `jobs`: how many images are imported at the same time."""

    url: str
    username: str | None = None
    password_env: str | None = None
    ca_file: str | None = None
    insecure: bool = False
    jobs: int = 4

    def find_upstream(self, configured: Iterable[Upstream]) -> Upstream | None:
        """Returns the upstream that has `url` as an endpoint; None if no upstream has it. If several upstreams have it,
        returns the last one. `configured`: the upstreams in the settings."""
        matches = [upstream for upstream in configured if self.url.rstrip("/") in upstream.endpoints]
        return matches[-1] if matches else None

    def configured_name(self, configured: Iterable[Upstream]) -> str | None:
        """Returns the name of the upstream that `find_upstream` finds, such as `docker.io`. The HTTP client looks for
        the login under this name in docker's `config.json`. The client trusts token services in the same registrable
        domain as this name: for `docker.io`, it may send the login to `auth.docker.io`. Returns None in these cases:

        - `find_upstream` finds no upstream.
        - `username` is set. The password of `username` is only for the registry at `url`, so the client must not trust
          more token services because of the upstream's name."""
        found = None if self.username is not None else self.find_upstream(configured)
        return None if found is None else found.name

    def to_upstream(self, configured: Iterable[Upstream] = ()) -> Upstream:
        """Returns the old registry as an upstream for the HTTP client. `configured`: the upstreams in the settings.
        Raises ImportInvalid if an option is not valid.

        If `find_upstream` finds an upstream, the result has its login and its other settings, with these exceptions:

        - A `username` or `ca_file` in the options takes precedence.
        - The name, the endpoints, the number of connections and the idle timeout are always those of the import."""
        host = urlsplit(self.url).netloc.rpartition("@")[2].lower()
        values: dict[str, Any] = {}
        if (found := self.find_upstream(configured)) is not None:
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
