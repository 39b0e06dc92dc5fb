"""What others feel of somebody who guesses passwords."""

from __future__ import annotations

from bench import storm
from bench.figures import CPU_SECONDS, P50, P99, RATE, SECONDS, Figure, Sample
from bench.rows.bearer_row import Closed, add_account
from bench.rows.row import Stage
from bench.servers import Server, running


class Storm:
    """Against Entrepot alone, since docker-registry knows no accounts. The rate is that of logins refused; p50 and p99
    are those of `GET /v2/` with a token meanwhile. One round: it takes half a minute, and is the same in each."""

    name = "login-storm"
    title = "10,000 wrong logins"
    figures: tuple[Figure, ...] = (RATE, P50, P99, SECONDS, CPU_SECONDS)
    rounds: int | None = 1

    def prepare(self, stage: Stage, server: Server) -> None:
        """Nothing: a server of its own is started for the trial, so that nobody was slowed down before."""

    def trial(self, stage: Stage, server: Server, number: int) -> Sample:
        if not server.kind.accounts:
            return {}
        folder = stage.folder / f"storm-{number}-{server.name}"
        with running(server.kind, folder) as stormed:
            token = Closed(stormed, add_account(server.kind, folder)).token()
            before = stormed.cpu()
            seen, rate = storm.load(stormed.port, token, number)
            used = stormed.cpu() - before
        took = {SECONDS.key: seen.seconds, CPU_SECONDS.key: used}
        return {RATE.key: rate, P50.key: seen.p50, P99.key: seen.p99, **took}
