"""The protocol class for `uvicorn.Config(app, http=…)`, so that a plain `uvicorn.Server` can run it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from registry.server.connection.context import WorkerContext
from registry.server.connection.protocol import RegistryProtocol
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.gate.trusted_proxies import TrustedProxies
from registry.server.server_limits import ServerLimits

if TYPE_CHECKING:
    from uvicorn import Config


def uvicorn_protocol_class(
    limits: ServerLimits | None = None, proxies: TrustedProxies | None = None
) -> type[asyncio.Protocol]:
    """Returns the class to give to `uvicorn.Config` as `http=`, for one server in one event loop.

    uvicorn calls it with its configuration, its server's state and the application's lifespan state for each
    connection. Connections are not limited: our own worker's acceptor does that. `root_path` has no effect.
    """
    workers: list[WorkerContext] = []

    class UvicornProtocol(RegistryProtocol):
        def __init__(
            self,
            config: Config,
            server_state: Any,
            app_state: dict[str, Any],
            _loop: asyncio.AbstractEventLoop | None = None,
        ) -> None:
            if not workers:
                loop, bounds = _loop or asyncio.get_running_loop(), limits or ServerLimits()
                budget = UnsentBudget(bounds.unsent_bytes, loop.time)
                app = config.loaded_app
                workers.append(WorkerContext(app, loop, bounds, budget, server_state, app_state, proxies))
            super().__init__(workers[0])

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._check_later()

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def _check_later(self) -> None:
            self._timer = self._worker.loop.call_later(self._limits.pulse_seconds, self._check)

        def _check(self) -> None:
            self.check(self._worker.loop.time())
            self._check_later()

    # uvicorn's type hint asks for a Protocol; both event loops take a BufferedProtocol as well.
    return cast("type[asyncio.Protocol]", UvicornProtocol)
