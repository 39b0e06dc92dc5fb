"""`SingleProcessChanges`: reloads of a server with one worker. Such a server is a single process: it has no supervisor,
the parent process that starts and replaces the workers of a larger server."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable

from registry.server.process.control_socket import ControlSocket, file_identity, listen_for_control, remove_socket_file
from registry.server.process.live_change import ChangeOutcome, ChangeRefused, Reply, reloaded
from registry.server.process.live_changes import no_reply
from registry.server.process.live_options import LiveOptions
from registry.server.process.worker import RunCommand
from registry.server.server_log import log

_NO_RESTART = (
    "a server with one worker cannot replace this worker without a pause: set workers = 2 or more, or stop the server "
    "and start it again"
)


class SingleProcessChanges:
    """Reloads the configuration at SIGHUP and at requests on the control socket, one reload at a time. Requests that
    come during a reload lead to one more reload. A restart would replace the worker process. This class refuses it, at
    SIGUSR2 and at requests on the control socket."""

    def __init__(self, live: LiveOptions, on_ready: Callable[[], None]) -> None:
        """Opens the control socket. Create this object before the process has threads, because its creation changes the
        umask for a moment. `on_ready`: called when the worker accepts connections."""
        self._live = live
        self._listener = None if live.control is None else listen_for_control(live.control)
        self._identity = None if live.control is None else file_identity(live.control)
        self._control: ControlSocket | None = None
        self._on_ready = on_ready
        self._waiting_replies: list[Reply] = []
        self._reload_requested = asyncio.Event()
        self._run_command: RunCommand | None = None

    def on_ready(self) -> None:
        """The worker calls this method when it accepts connections."""
        self._live.notifier.ready("1 worker serves")
        self._on_ready()

    def start(self, loop: asyncio.AbstractEventLoop, run_command: RunCommand) -> Callable[[], None]:
        """Starts to handle the signals and the requests on the control socket. `run_command`: runs a command in the
        worker. Returns a function that ends the handling."""
        self._run_command = run_command
        loop.add_signal_handler(signal.SIGHUP, self._request_reload, no_reply)
        loop.add_signal_handler(signal.SIGUSR2, self._refuse_restart, no_reply)
        task = loop.create_task(self._reload_when_requested(), name="reloads")
        if self._listener is not None and self._live.control is not None:
            actions = {"reload": self._request_reload, "restart": self._refuse_restart}

            def watch(sock: socket.socket, callback: Callable[[], None]) -> None:
                loop.add_reader(sock, callback)

            def unwatch(sock: socket.socket) -> None:
                loop.remove_reader(sock)

            self._control = ControlSocket(self._listener, self._live.control, actions, watch, unwatch)

        def end() -> None:
            self._live.notifier.stopping()
            task.cancel()
            self.close()

        return end

    def close(self) -> None:
        """Removes the control socket. May be called repeatedly."""
        listener, self._listener = self._listener, None
        if self._control is not None:
            self._control.close()
            self._control = None
        elif listener is not None and self._live.control is not None:
            remove_socket_file(self._live.control, self._identity)
            listener.close()

    def _request_reload(self, reply: Reply) -> None:
        self._waiting_replies.append(reply)
        self._reload_requested.set()

    def _refuse_restart(self, reply: Reply) -> None:
        log.error("%s", _NO_RESTART)
        reply(ChangeOutcome(False, _NO_RESTART))

    async def _reload_when_requested(self) -> None:
        """Runs the requested reloads one after another, until the task is cancelled. A reload answers all requests that
        were made before it began."""
        while True:
            await self._reload_requested.wait()
            self._reload_requested.clear()
            replies, self._waiting_replies = self._waiting_replies, []
            try:
                self._live.notifier.reloading()
                outcome = await self._reload()
            except Exception as error:
                log.error("a reload failed", exc_info=error)
                outcome = ChangeOutcome(False, str(error) or type(error).__name__)
            if outcome.ok:
                log.info("%s", outcome.message)
            else:
                log.error("the configuration is not reloaded, the old one stays in force: %s", outcome.message)
            self._live.notifier.ready(outcome.message if outcome.ok else "running; the last change was refused")
            for reply in replies:
                reply(outcome)

    async def _reload(self) -> ChangeOutcome:
        """Reloads the configuration, and returns the outcome. The worker's command `prepare` opens the new
        configuration, `switch` makes the worker use it, and `discard` drops it. Raises the errors of `switch` and
        `discard`."""
        assert self._run_command is not None
        source = self._live.configuration
        try:
            proposal = await asyncio.to_thread(source.propose)  # reads files and the database
            await self._run_command("prepare", proposal.configuration)
        except ChangeRefused as error:
            return ChangeOutcome(False, error.message)
        except Exception as error:
            message = getattr(error, "message", None)
            if not isinstance(message, str):
                log.error("the new configuration cannot be opened", exc_info=error)
            return ChangeOutcome(False, str(message or error))
        try:
            source.accept(proposal)
        except Exception as error:
            log.error("the new configuration cannot be put in force", exc_info=error)
            await self._run_command("discard", b"")
            return ChangeOutcome(False, str(error) or type(error).__name__)
        await self._run_command("switch", b"")
        return reloaded(proposal)
