"""What is attacked: a server with two workers over a large store, with accounts and bad upstreams."""

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

ENVIRONMENT = {"ENTREPOT_LOG_LEVEL": "warning"}


@dataclass
class AttackedSite:
    """A running server, who may log in there, and its upstreams. `fresh()` gives a text that was not used before, so
    that no request is answered from what an earlier one left behind."""

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
        """One request, by an account or by anybody."""
        shown = {"Authorization": self.logins[login]} if login else {}
        return attack_requests.ask(self.port, method, target, {**shown, **(headers or {})}, body)

    def talk(self, data: bytes) -> AttackAnswer:
        """Bytes as they are."""
        return attack_requests.talk(self.port, data)


@contextlib.contextmanager
def running_site(folder: Path, logins: Mapping[str, str]) -> Iterator[AttackedSite]:
    """Serves the store that `large_store.build` made in `folder / "data"`, for the length of the block."""
    with bad_upstreams(folder) as upstreams:
        settings = folder / "entrepot.toml"
        settings.write_text(upstreams.settings())
        with running_server(folder, "--config", str(settings), env=ENVIRONMENT, own_interpreter=True) as server:
            yield AttackedSite(server, logins, upstreams)
