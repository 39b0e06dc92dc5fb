"""The task that calls the application for one request (`RequestTask`)."""

from __future__ import annotations

from typing import Final

from registry.server.connection.asgi_exchange import AsgiExchange
from registry.server.connection.context import WorkerContext

_READS: Final = frozenset({"GET", "HEAD"})
"""Methods of requests that change nothing, so that the application may be interrupted."""


class RequestTask:
    """The task that answers one request of a connection. The worker keeps it in `state.tasks` until it ends."""

    def __init__(self, worker: WorkerContext, exchange: AsgiExchange) -> None:
        """Starts the task. First evicts (closes) silent connections if too few file descriptors are free."""
        if worker.connection_limit is not None:
            worker.connection_limit.make_room_for_request()
        self._exchange = exchange
        self._task = worker.loop.create_task(exchange.run(worker.app))
        worker.state.tasks.add(self._task)
        self._task.add_done_callback(worker.state.tasks.discard)

    def on_disconnect(self) -> None:
        """Called when the client cannot get the application's response any more: its connection is lost, or the server
        refuses the request's body. Tells the application that the client has disconnected. If the request is a read
        whose response has not started, also cancels the task.

        Without the cancellation, the application could go on waiting, such as for an upstream registry that does not
        answer. The connection no longer counts under any limit then, so a client could make any number of requests wait
        by resetting its connections. A write is not cancelled, because its change may be half done. If the
        response has started, no cancellation is needed: the application gets an error when it sends the next part."""
        exchange = self._exchange
        must_cancel = (
            exchange.scope["method"] in _READS and not exchange.response_started and not exchange.body.is_disconnected
        )
        exchange.disconnect()
        if must_cancel:
            self._task.cancel()
