"""What accounts cost: a manifest by tag with a token, against the same without accounts."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from dataclasses import dataclass
from pathlib import Path

from bench import wrk
from bench.content import ACCEPT
from bench.figures import CPU, P50, P99, RATE, TOLL, Figure, Sample
from bench.rows.row import REPO, Stage
from bench.rows.small_rows import measured, small_target
from bench.servers import ENTREPOT, Server, running
from bench.wire import Client

ACCOUNT = "bench"


class Bearer:
    """Against Entrepot alone, since docker-registry has no token service: two servers with the same content, one of
    which has an account, half of a trial each and in turn."""

    name = "manifest-tag-bearer"
    title = "manifest by tag, with a token"
    figures: tuple[Figure, ...] = (RATE, CPU, TOLL, P50, P99)
    rounds: int | None = None

    def __init__(self) -> None:
        self._closed: Closed | None = None

    def prepare(self, stage: Stage, server: Server) -> None:
        """Starts the one with accounts, and has each answer for a second. Content goes in while it is still open."""
        if server.name != ENTREPOT.name:
            return
        folder = stage.folder / "accounts"
        closed = stage.stack.enter_context(running(ENTREPOT, folder))
        stage.fill(closed)
        self._closed = Closed(closed, asyncio.run(add_account(folder / "data")))
        for each in (server, closed):
            _load(stage, each, 1, self._closed.token())

    def trial(self, stage: Stage, server: Server, number: int) -> Sample:
        """The toll is the CPU time of a request with a token as a multiple of that of one without accounts."""
        if self._closed is None or server.name != ENTREPOT.name:
            return {}
        token, found = self._closed.token(), {}
        for each in (server, self._closed.server) if number % 2 else (self._closed.server, server):
            found[each] = _load(stage, each, stage.seconds / 2, token if each is not server else None)
        with_token, without = found[self._closed.server], found[server]
        return {**with_token, TOLL.key: with_token[CPU.key] / without[CPU.key]}


@dataclass(frozen=True)
class Closed:
    """The server with an account, and the account's login."""

    server: Server
    login: str

    def token(self) -> str:
        """A new one, good for minutes."""
        basic = base64.b64encode(f"{ACCOUNT}:{self.login}".encode()).decode()
        with Client(self.server.port) as client:
            where = f"/token?service=entrepot&scope=repository:{REPO}:pull"
            answer = client.ask("GET", where, headers={"Authorization": f"Basic {basic}"}, expect=200)
        text: str = json.loads(answer.body)["token"]
        return text


def _load(stage: Stage, server: Server, seconds: float, token: str | None) -> Sample:
    target = small_target("tag")(stage)
    headers = {"Accept": ACCEPT} | ({"Authorization": f"Bearer {token}"} if token else {})
    return measured(server, lambda: wrk.load(server.url + target.path, seconds, size=target.size, headers=headers))


async def add_account(data: Path) -> str:
    """Closes the registry over `data` with a user who may pull what is measured, and no more; an API token of it."""
    from registry.auth import api_tokens
    from storage.access import AccountName, Action, Grant, Kind, Subject
    from storage.content import Actor
    from storage.opening import open_accounts
    from storage.patterns import NamePattern

    by, name = Actor("bench"), AccountName(ACCOUNT)
    made = api_tokens.make(name, now=time.time())
    async with open_accounts(data) as accounts:
        await accounts.add_account(name, Kind.USER, password_hash=None, by=by)
        await accounts.put_grant(Grant(Subject.parse(f"user:{name}"), NamePattern("bench/**"), Action.PULL), by=by)
        await accounts.add_token(made.token, made.secret_hash, by=by)
    return made.text
