"""`ServerRun`: what distinguishes one run of the server from another."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

INSTANCE_HEADER = "x-entrepot-instance"
"""The header of `/livez` with the id of the run."""


@dataclass(frozen=True, slots=True)
class ServerRun:
    """One run of `entrepot serve`: all of its worker processes have the same. `instance`: a random id, with which
    `entrepot doctor` finds out whether a URL leads to this server. `started`: in seconds since 1970."""

    instance: str
    started: float


def new_server_run(clock: Callable[[], float] = time.time) -> ServerRun:
    """Returns a new run, which starts now. Call it before the workers are forked."""
    return ServerRun(secrets.token_hex(16), clock())
