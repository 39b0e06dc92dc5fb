"""What is attacked: a server with two workers over a large store, with accounts and bad upstreams."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.hostile import sending
from tests.hostile.bad_upstreams import BadUpstreams, bad_upstreams
from tests.hostile.sending import Answer
from tests.serving import Server, running_server

ENVIRONMENT = {"ENTREPOT_LOG_LEVEL": "warning"}


@dataclass
class Site:
    """A running server, who may log in there, and its upstreams. `fresh()` gives a text that was not used before, so
    that no request is answered from what an earlier one left behind."""

    server: Server
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
    ) -> Answer:
        """One request, by an account or by anybody."""
        shown = {"Authorization": self.logins[login]} if login else {}
        return sending.ask(self.port, method, target, {**shown, **(headers or {})}, body)

    def talk(self, data: bytes) -> Answer:
        """Bytes as they are."""
        return sending.talk(self.port, data)


@contextlib.contextmanager
def running_site(folder: Path, logins: Mapping[str, str]) -> Iterator[Site]:
    """Serves the store that `large_store.build` made in `folder / "data"`, for the length of the block."""
    with bad_upstreams(folder) as upstreams:
        settings = folder / "entrepot.toml"
        settings.write_text(upstreams.settings())
        with running_server(folder, "--config", str(settings), env=ENVIRONMENT) as server:
            yield Site(server, logins, upstreams)
