"""Adapts `RegistryProtocol`, the server's class for connections, to uvicorn: a plain `uvicorn.Server` can use the class
that `uvicorn_protocol_class` returns."""

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
    """Returns the class to pass to `uvicorn.Config` as `http=`. Use each returned class for one server in one event
    loop. `limits`: the limits for the connections; None: the default limits. `proxies`: the trusted reverse proxies;
    None: there are none.

    The number of connections is not limited. The registry's own server checks its limit when it accepts a connection,
    but here uvicorn accepts the connections. uvicorn's setting `root_path` has no effect.
    """
    # Empty before the first connection; then contains the context that all connections share. uvicorn creates a
    # `UvicornProtocol` for each connection. The first `UvicornProtocol` creates the context, because the context needs
    # values that uvicorn passes only to the constructor of `UvicornProtocol`.
    contexts: list[WorkerContext] = []

    class UvicornProtocol(RegistryProtocol):
        def __init__(
            self,
            config: Config,
            server_state: Any,
            app_state: dict[str, Any],
            _loop: asyncio.AbstractEventLoop | None = None,
        ) -> None:
            if not contexts:
                loop, effective_limits = _loop or asyncio.get_running_loop(), limits or ServerLimits()
                budget = UnsentBudget(effective_limits.unsent_bytes, effective_limits.unsent_wait_seconds, loop.time)
                app = config.loaded_app
                contexts.append(WorkerContext(app, loop, effective_limits, budget, server_state, app_state, proxies))
            super().__init__(contexts[0])

        # uvicorn does not check the timeouts of the connections, so each connection has a timer.

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._start_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def _start_timer(self) -> None:
            self._timer = self._worker.loop.call_later(self._limits.timeout_check_seconds, self._on_timer)

        def _on_timer(self) -> None:
            self.check_timeouts(self._worker.loop.time())
            self._start_timer()

    # uvicorn declares the type asyncio.Protocol. RegistryProtocol is a BufferedProtocol, which asyncio and uvloop
    # accept as well.
    return cast("type[asyncio.Protocol]", UvicornProtocol)
