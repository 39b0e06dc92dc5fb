"""The attacked server: two workers over a large store, with accounts and bad upstreams."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.fakes.server_process import RegistryServer, running_server
from tests.system.hostile import attack_requests
from tests.system.hostile.attack_requests import AttackAnswer
from tests.system.hostile.bad_upstreams import BadUpstreams, bad_upstreams

ENVIRONMENT = {"ENTREPOT_LOG_LEVEL": "warning", "ENTREPOT_EVENTS__KEEP": "90d"}
"""The environment variables of the attacked server. It keeps the events of the large store, which are 30 days old."""


@dataclass
class AttackedSite:
    """A running server, the Authorization headers of its accounts (`logins`), and its upstreams. `fresh()` returns a
    text that was not used before, so that no cache has the response to a request with this text."""

    server: RegistryServer
    logins: Mapping[str, str]
    upstreams: BadUpstreams
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def port(self) -> int:
        return self.server.port

    def fresh(self) -> str:
        return f"n{next(self._numbers)}"

    def number(self) -> int:
        """Like `fresh`, but returns a number."""
        return next(self._numbers)

    def ask(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        *,
        login: str = "",
    ) -> AttackAnswer:
        """Sends one request. `login`: the name of the account that sends it; empty: an anonymous client."""
        credentials = {"Authorization": self.logins[login]} if login else {}
        return attack_requests.ask(self.port, method, target, {**credentials, **(headers or {})}, body)

    def talk(self, data: bytes) -> AttackAnswer:
        """Sends these bytes over a new connection. Returns the response."""
        return attack_requests.talk(self.port, data)


@contextlib.contextmanager
def running_site(folder: Path, logins: Mapping[str, str]) -> Iterator[AttackedSite]:
    """Runs the server during the `with` block. Its store is the one that `large_store.build` has made in `folder /
    "data"`."""
    with bad_upstreams(folder) as upstreams:
        settings = folder / "entrepot.toml"
        settings.write_text(upstreams.settings())
        with running_server(folder, "--config", str(settings), env=ENVIRONMENT, own_interpreter=True) as server:
            yield AttackedSite(server, logins, upstreams)
