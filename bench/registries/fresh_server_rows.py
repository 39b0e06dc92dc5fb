"""What accounts cost: a manifest by tag with a token, against the same without accounts.

What others feel of somebody who guesses passwords.

Starting, and the memory of a server that has nothing to do.
"""

from __future__ import annotations

import base64
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from bench.loaders import login_storm, wrk
from bench.loaders.http_client import HttpClient
from bench.random_content import MANIFEST_ACCEPT, MIB
from bench.registries.request_rows import measure_load, request_target
from bench.registries.trial_setup import APP_REPO, TrialSetup
from bench.report.measurements import CPU, CPU_SECONDS, P50, P99, PSS, RATE, SECONDS, TOKEN_COST, Figure, Sample
from bench.system.servers import RunningServer, ServerProgram, run_entrepot, started_server

ACCOUNT = "bench"
WARM_UP_SECONDS = 1.0
"""Seconds in which each is asked before it is measured."""


class BearerRow:
    """Against Entrepot alone, since docker-registry has no token service: two servers with the same content, one of
    which has an account, half of a trial each and in turn. Both are started anew for each trial: two processes of one
    program differ by up to a tenth for as long as they live, which is as much as a token costs."""

    name = "manifest-tag-bearer"
    title = "manifest by tag, with a token"
    figures: tuple[Figure, ...] = (RATE, CPU, TOKEN_COST, P50, P99)
    rounds: int | None = None

    def __init__(self) -> None:
        self._logins: dict[str, str] = {}

    def prepare(self, stage: TrialSetup, server: RunningServer) -> None:
        """Fills both stores, and then closes one: content goes in while it is still open."""
        if not server.kind.accounts:
            return
        folders = _folders(stage, server.kind)
        for folder in folders:
            with started_server(server.kind, folder) as filled:
                stage.fill(filled)
        self._logins[server.name] = add_account(server.kind, folders[1])

    def trial(self, stage: TrialSetup, server: RunningServer, number: int) -> Sample:
        """The toll is the CPU time of a request with a token as a multiple of that of one without accounts."""
        if not server.kind.accounts:
            return {}
        free, closed = _folders(stage, server.kind)
        with started_server(server.kind, free) as without, started_server(server.kind, closed) as within:
            token = ClosedServer(within, self._logins[server.name]).token()
            both: list[tuple[RunningServer, str | None]] = [(without, None), (within, token)]
            for each, shown in both:
                _load(stage, each, WARM_UP_SECONDS, shown)
            turns = both if number % 2 else both[::-1]
            found = {each: _load(stage, each, stage.seconds / 2, shown) for each, shown in turns}
        return {**found[within], TOKEN_COST.key: found[within][CPU.key] / found[without][CPU.key]}


@dataclass(frozen=True)
class ClosedServer:
    """The server with an account, and the account's login."""

    server: RunningServer
    login: str

    def token(self) -> str:
        """A new one, good for minutes."""
        basic = base64.b64encode(f"{ACCOUNT}:{self.login}".encode()).decode()
        with HttpClient(self.server.port) as client:
            where = f"/token?service=entrepot&scope=repository:{APP_REPO}:pull"
            answer = client.ask("GET", where, headers={"Authorization": f"Basic {basic}"}, expect=200)
        text: str = json.loads(answer.body)["token"]
        return text


def _folders(stage: TrialSetup, kind: ServerProgram) -> tuple[Path, Path]:
    """Of the registry without accounts, and of the one with."""
    return stage.folder / f"{kind.name} no accounts", stage.folder / f"{kind.name} accounts"


def _load(stage: TrialSetup, server: RunningServer, seconds: float, token: str | None) -> Sample:
    target = request_target("tag")(stage)
    headers = {"Accept": MANIFEST_ACCEPT} | ({"Authorization": f"Bearer {token}"} if token else {})
    return measure_load(
        server, lambda: wrk.run_wrk(server.url + target.path, seconds, size=target.size, headers=headers)
    )


def add_account(kind: ServerProgram, folder: Path) -> str:
    """Closes the registry in `folder` with a robot that may pull the measured images and nothing else. Returns an API
    token of the robot. The commands are those of the measured version, since another one may know a newer store."""
    run_entrepot(kind, folder, "robot", "add", ACCOUNT)
    run_entrepot(kind, folder, "grant", "add", "bench/**", "pull", f"robot:{ACCOUNT}")
    return run_entrepot(kind, folder, "token", "add", ACCOUNT).strip()


class LoginStormRow:
    """Against Entrepot alone, since docker-registry knows no accounts. The rate is that of logins refused; p50 and p99
    are those of `GET /v2/` with a token meanwhile. One round: it takes half a minute, and is the same in each."""

    name = "login-storm"
    title = "10,000 wrong logins"
    figures: tuple[Figure, ...] = (RATE, P50, P99, SECONDS, CPU_SECONDS)
    rounds: int | None = 1

    def prepare(self, stage: TrialSetup, server: RunningServer) -> None:
        """Nothing: a server of its own is started for the trial, so that nobody was slowed down before."""

    def trial(self, stage: TrialSetup, server: RunningServer, number: int) -> Sample:
        if not server.kind.accounts:
            return {}
        folder = stage.folder / f"storm-{number}-{server.name}"
        with started_server(server.kind, folder) as stormed:
            token = ClosedServer(stormed, add_account(server.kind, folder)).token()
            before = stormed.cpu()
            seen, rate = login_storm.run_login_storm(stormed.port, token, number)
            used = stormed.cpu() - before
        took = {SECONDS.key: seen.seconds, CPU_SECONDS.key: used}
        return {RATE.key: rate, P50.key: seen.p50, P99.key: seen.p99, **took}


IDLE_AFTER_SECONDS = 1.0
"""Seconds after its first answer until a server counts as idle."""


class StartRow:
    """From exec to the first 200, on an empty folder; then memory, a second later."""

    name = "start"
    title = "start on an empty store; idle"
    figures: tuple[Figure, ...] = (SECONDS, PSS)
    rounds: int | None = None

    def prepare(self, stage: TrialSetup, server: RunningServer) -> None:
        """One start that does not count: it compiles, and brings the program into the page cache."""
        self.trial(stage, server, -1)

    def trial(self, stage: TrialSetup, server: RunningServer, number: int) -> Sample:
        kind = next(kind for kind in stage.kinds if kind.name == server.name)
        folder = stage.folder / f"start{number}-{kind.name}"
        try:
            with started_server(kind, folder) as fresh:
                time.sleep(IDLE_AFTER_SECONDS)
                return {SECONDS.key: fresh.start_seconds, PSS.key: fresh.pss() / MIB}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
