"""Starting, and the memory of a server that has nothing to do."""

from __future__ import annotations

import shutil
import time

from bench.content import MIB
from bench.figures import PSS, SECONDS, Figure, Sample
from bench.rows.row import Stage
from bench.servers import Server, running

SETTLED = 1.0
"""Seconds after its first answer until a server counts as idle."""


class Start:
    """From exec to the first 200, on an empty folder; then memory, a second later."""

    name = "start"
    title = "start on an empty store; idle"
    figures: tuple[Figure, ...] = (SECONDS, PSS)
    rounds: int | None = None

    def prepare(self, stage: Stage, server: Server) -> None:
        """One start that does not count: it compiles, and brings the program into the page cache."""
        self.trial(stage, server, -1)

    def trial(self, stage: Stage, server: Server, number: int) -> Sample:
        kind = next(kind for kind in stage.kinds if kind.name == server.name)
        folder = stage.folder / f"start{number}-{kind.name}"
        try:
            with running(kind, folder) as fresh:
                time.sleep(SETTLED)
                return {SECONDS.key: fresh.started_in, PSS.key: fresh.pss() / MIB}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
