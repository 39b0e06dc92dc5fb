"""What accounts cost: a manifest by tag with a token, against the same without accounts."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from bench import wrk
from bench.content import ACCEPT
from bench.figures import CPU, P50, P99, RATE, TOLL, Figure, Sample
from bench.rows.row import REPO, Stage
from bench.rows.small_rows import measured, small_target
from bench.servers import Kind, Server, entrepot, running
from bench.wire import Client

ACCOUNT = "bench"
WARM = 1.0
"""Seconds in which each is asked before it is measured."""


class Bearer:
    """Against Entrepot alone, since docker-registry has no token service: two servers with the same content, one of
    which has an account, half of a trial each and in turn. Both are started anew for each trial: two processes of one
    program differ by up to a tenth for as long as they live, which is as much as a token costs."""

    name = "manifest-tag-bearer"
    title = "manifest by tag, with a token"
    figures: tuple[Figure, ...] = (RATE, CPU, TOLL, P50, P99)
    rounds: int | None = None

    def __init__(self) -> None:
        self._logins: dict[str, str] = {}

    def prepare(self, stage: Stage, server: Server) -> None:
        """Fills both stores, and then closes one: content goes in while it is still open."""
        if not server.kind.accounts:
            return
        folders = _folders(stage, server.kind)
        for folder in folders:
            with running(server.kind, folder) as filled:
                stage.fill(filled)
        self._logins[server.name] = add_account(server.kind, folders[1])

    def trial(self, stage: Stage, server: Server, number: int) -> Sample:
        """The toll is the CPU time of a request with a token as a multiple of that of one without accounts."""
        if not server.kind.accounts:
            return {}
        free, closed = _folders(stage, server.kind)
        with running(server.kind, free) as without, running(server.kind, closed) as within:
            token = Closed(within, self._logins[server.name]).token()
            both: list[tuple[Server, str | None]] = [(without, None), (within, token)]
            for each, shown in both:
                _load(stage, each, WARM, shown)
            turns = both if number % 2 else both[::-1]
            found = {each: _load(stage, each, stage.seconds / 2, shown) for each, shown in turns}
        return {**found[within], TOLL.key: found[within][CPU.key] / found[without][CPU.key]}


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


def _folders(stage: Stage, kind: Kind) -> tuple[Path, Path]:
    """Of the registry without accounts, and of the one with."""
    return stage.folder / f"{kind.name} no accounts", stage.folder / f"{kind.name} accounts"


def _load(stage: Stage, server: Server, seconds: float, token: str | None) -> Sample:
    target = small_target("tag")(stage)
    headers = {"Accept": ACCEPT} | ({"Authorization": f"Bearer {token}"} if token else {})
    return measured(server, lambda: wrk.load(server.url + target.path, seconds, size=target.size, headers=headers))


def add_account(kind: Kind, folder: Path) -> str:
    """Closes the registry in `folder` with a robot that may pull the measured images and nothing else. Returns an API
    token of the robot. The commands are those of the measured version, since another one may know a newer store."""
    entrepot(kind, folder, "robot", "add", ACCOUNT)
    entrepot(kind, folder, "grant", "add", "bench/**", "pull", f"robot:{ACCOUNT}")
    return entrepot(kind, folder, "token", "add", ACCOUNT).strip()
