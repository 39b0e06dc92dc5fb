"""The task that calls the application for one request (`RequestTask`)."""

from __future__ import annotations

from typing import Final

from registry.server.connection.asgi_exchange import AsgiExchange
from registry.server.connection.context import WorkerContext

_READ_METHODS: Final = frozenset({"GET", "HEAD"})
"""Methods of requests that change nothing. The task of such a request may be cancelled."""


class RequestTask:
    """The task that answers one request of a connection. It is in `worker.state.tasks` until it ends."""

    def __init__(self, worker: WorkerContext, exchange: AsgiExchange) -> None:
        """Starts the task. If too few file descriptors are free, first evicts (closes) silent connections."""
        if worker.connection_limit is not None:
            worker.connection_limit.make_room_for_request()
        self._exchange = exchange
        self._task = worker.loop.create_task(exchange.run(worker.app))
        worker.state.tasks.add(self._task)
        self._task.add_done_callback(worker.state.tasks.discard)

    def on_disconnect(self) -> None:
        """Tells the application that the client has disconnected. Call this method when the connection is lost, or when
        the server refuses the request's body.

        Cancels the task if the request is a GET or HEAD and its response has not started. Otherwise a client could make
        any number of requests wait, for example for a slow upstream registry: the connection limits do not count lost
        connections. A task that may change something is not cancelled, because its change may be half done. After the
        response has started, the application gets an error when it sends the next part."""
        exchange = self._exchange
        must_cancel = (
            exchange.scope["method"] in _READ_METHODS
            and not exchange.response_started
            and not exchange.body.is_disconnected
        )
        exchange.disconnect()
        if must_cancel:
            self._task.cancel()
