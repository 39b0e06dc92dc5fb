"""Rows of the table of the bench `registries` for which each trial starts its own servers: start time and idle memory,
and the costs of accounts."""

from __future__ import annotations

import base64
import json
import shutil
import time
from pathlib import Path

from bench.loaders.http_client import HttpClient
from bench.loaders.load_report import measure_load
from bench.loaders.login_storm import run_login_storm
from bench.loaders.wrk import DEFAULT_HEADERS
from bench.random_content import MIB
from bench.registries.registry_trial import APP_REPO, RegistryTrial
from bench.registries.request_rows import WARM_UP_SECONDS, latest_manifest, load_target
from bench.report.measurements import CPU, CPU_SECONDS, P50, P99, PSS, RATE, SECONDS, TOKEN_COST, Sample
from bench.runner import Row
from bench.system.servers import Meter, RunningServer, ServerProgram, run_entrepot, started_server

ACCOUNT = "bench"
IDLE_AFTER_SECONDS = 1.0
"""A server counts as idle this many seconds after its first response."""


def _start(trial: RegistryTrial) -> Sample:
    """Starts a server on an empty data folder. Measures the time from exec to the first response with status 200, and
    the memory a second later. The row also runs this function as its preparation: the first start compiles the
    program's modules and brings them into the page cache."""
    folder = trial.content.folder / f"start-{trial.server.name}"
    try:
        with started_server(trial.program, folder) as server:
            time.sleep(IDLE_AFTER_SECONDS)
            return {SECONDS.key: server.start_seconds, PSS.key: server.pss() / MIB}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _folders(trial: RegistryTrial) -> tuple[Path, Path]:
    """Returns the folder of the registry without accounts, and the folder of the registry with an account."""
    name, folder = trial.server.name, trial.content.folder
    return folder / f"{name} no accounts", folder / f"{name} accounts"


def _fill_with_and_without_accounts(trial: RegistryTrial) -> None:
    """Pushes the content to both registries, and then adds an account to one of them. Without an account,
    anyone can push to a registry; with one, clients have to log in."""
    folders = _folders(trial)
    for folder in folders:
        with started_server(trial.program, folder) as server:
            trial.content.fill(server)
    trial.content.api_tokens[trial.server.name] = _add_account(trial.program, folders[1])


def _get_manifests_with_token(trial: RegistryTrial) -> Sample:
    """Compares the CPU time of a request with a token to the CPU time of a request to a registry without accounts. Each
    of the two is measured for half of a trial. Both servers are new for each trial. The reason: one of two processes of
    the same program can be up to 10 % slower for its whole life, and the check of a token adds at most 10 % to a
    request. If all trials used the same two processes, the difference between these could hide the cost of the
    check."""
    open_folder, closed_folder = _folders(trial)
    with (
        started_server(trial.program, open_folder) as open_server,
        started_server(trial.program, closed_folder) as closed_server,
    ):
        token = _bearer_token(closed_server, trial.content.api_tokens[trial.server.name])
        with_token = DEFAULT_HEADERS | {"Authorization": f"Bearer {token}"}
        loads = [(open_server, DEFAULT_HEADERS), (closed_server, with_token)]
        samples: dict[str, Sample] = {}
        for seconds in (WARM_UP_SECONDS, trial.seconds / 2):
            for server, headers in loads if trial.round % 2 else reversed(loads):
                samples[server.url] = _load_latest(trial, server, seconds, headers)
    sample = samples[closed_server.url]
    return {**sample, TOKEN_COST.key: sample[CPU.key] / samples[open_server.url][CPU.key]}


def _load_latest(trial: RegistryTrial, server: RunningServer, seconds: float, headers: dict[str, str]) -> Sample:
    half_trial = RegistryTrial(trial.content, server, seconds, trial.round)
    return measure_load(server, lambda: load_target(half_trial, latest_manifest, seconds, headers))


def _bearer_token(server: RunningServer, api_token: str) -> str:
    """Returns a new token of the account, valid for minutes."""
    basic = base64.b64encode(f"{ACCOUNT}:{api_token}".encode()).decode()
    path = f"/token?service=entrepot&scope=repository:{APP_REPO}:pull"
    with HttpClient(server.port) as client:
        response = client.request("GET", path, headers={"Authorization": f"Basic {basic}"}, expect=200)
    token: str = json.loads(response.body)["token"]
    return token


def _add_account(program: ServerProgram, folder: Path) -> str:
    """Adds a robot account that may pull the measured images. From then on, the registry requires a login. Returns an
    API token of the robot. Runs the commands of the measured version, because another version may not be able to open
    the store."""
    run_entrepot(program, folder, "robot", "add", ACCOUNT)
    run_entrepot(program, folder, "grant", "add", "bench/**", "pull", f"robot:{ACCOUNT}")
    return run_entrepot(program, folder, "token", "add", ACCOUNT).strip()


def _storm_logins(trial: RegistryTrial) -> Sample:
    """Sends wrong logins to a new server. The rate is the number of refused logins per second. p50 and p99 are the
    latencies of `GET /v2/` with a token during these logins."""
    folder = trial.content.folder / f"storm-{trial.round}-{trial.server.name}"
    with started_server(trial.program, folder) as server:
        token = _bearer_token(server, _add_account(trial.program, folder))
        meter = Meter(server)
        report, rate = run_login_storm(server.port, token, trial.round)
        cpu_seconds = meter.cpu()
    durations = {SECONDS.key: report.seconds, CPU_SECONDS.key: cpu_seconds}
    return {RATE.key: rate, P50.key: report.p50, P99.key: report.p99, **durations}


START_ROW = Row("start", "start on an empty store; idle", (SECONDS, PSS), _start, _start)
# The next two rows are measured with Entrepot only: docker-registry has no token service and no accounts.
BEARER_ROW = Row(
    "manifest-tag-bearer",
    "manifest by tag, with a token",
    (RATE, CPU, TOKEN_COST, P50, P99),
    _get_manifests_with_token,
    _fill_with_and_without_accounts,
    peer_rounds=0,
)
# Measured in one round only: a trial takes half a minute, and more rounds give the same result.
LOGIN_STORM_ROW = Row(
    "login-storm", "10,000 wrong logins", (RATE, P50, P99, SECONDS, CPU_SECONDS), _storm_logins, rounds=1, peer_rounds=0
)
