"""`SingleProcessReloads`: reloads the configuration of a server with one worker. Such a server is a single process,
without a supervisor (the parent process that starts and replaces several workers)."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable

from registry.server.process.control_socket import ControlSocket, file_identity, listen_for_control, remove_socket_file
from registry.server.process.live_change import ChangeOutcome, ChangeRefused, Reply, reload_outcome
from registry.server.process.live_change_options import LiveChangeOptions
from registry.server.process.live_change_queue import no_reply
from registry.server.process.worker import RunCommand
from registry.server.server_log import log

_NO_RESTART = (
    "a server with one worker cannot replace its worker without a pause: set workers = 2 or more, or stop the server "
    "and start it again"
)


class SingleProcessReloads:
    """Handles SIGHUP, SIGUSR2 and the requests on the control socket:

    - SIGHUP and the request `reload` reload the configuration. One reload runs at a time. If requests arrive while a
      reload runs, they wait for its end. The next reload answers all of them.
    - SIGUSR2 and the request `restart` are refused: without a supervisor, no process can replace the worker."""

    def __init__(self, change_options: LiveChangeOptions, on_ready: Callable[[], None]) -> None:
        """Opens the control socket. Call this before the process has threads, because it changes the umask for a
        moment. `on_ready`: called when the server is ready."""
        self._change_options = change_options
        self._listener = None if change_options.control is None else listen_for_control(change_options.control)
        self._identity = None if change_options.control is None else file_identity(change_options.control)
        self._control: ControlSocket | None = None
        self._on_ready = on_ready
        self._waiting_replies: list[Reply] = []
        self._reload_requested = asyncio.Event()
        self._run_command: RunCommand | None = None

    def announce_ready(self) -> None:
        """Tells the service manager that the server is ready, and calls `on_ready`. Called when the worker accepts
        connections."""
        self._change_options.notifier.report_ready("1 worker serves")
        self._on_ready()

    def start(self, loop: asyncio.AbstractEventLoop, run_command: RunCommand) -> Callable[[], None]:
        """Starts to handle the signals and the requests on the control socket. `run_command`: runs a command in the
        worker. Returns a function that stops the handling and closes the control socket."""
        self._run_command = run_command
        loop.add_signal_handler(signal.SIGHUP, self._request_reload, no_reply)
        loop.add_signal_handler(signal.SIGUSR2, self._refuse_restart, no_reply)
        task = loop.create_task(self._reload_when_requested(), name="reloads")
        if self._listener is not None and self._change_options.control is not None:
            actions = {"reload": self._request_reload, "restart": self._refuse_restart}

            def watch(sock: socket.socket, callback: Callable[[], None]) -> None:
                loop.add_reader(sock, callback)

            def unwatch(sock: socket.socket) -> None:
                loop.remove_reader(sock)

            self._control = ControlSocket(self._listener, self._change_options.control, actions, watch, unwatch)

        def end() -> None:
            self._change_options.notifier.report_stopping()
            task.cancel()
            self.close()

        return end

    def close(self) -> None:
        """Closes the control socket and removes its file. May be called repeatedly."""
        listener, self._listener = self._listener, None
        if self._control is not None:
            self._control.close()
            self._control = None
        elif listener is not None and self._change_options.control is not None:
            remove_socket_file(self._change_options.control, self._identity)
            listener.close()

    def _request_reload(self, reply: Reply) -> None:
        self._waiting_replies.append(reply)
        self._reload_requested.set()

    def _refuse_restart(self, reply: Reply) -> None:
        log.error("%s", _NO_RESTART)
        reply(ChangeOutcome(False, _NO_RESTART))

    async def _reload_when_requested(self) -> None:
        """Runs the requested reloads one after another, until the task is cancelled. Each reload answers all requests
        that arrived before the reload began."""
        while True:
            await self._reload_requested.wait()
            self._reload_requested.clear()
            replies, self._waiting_replies = self._waiting_replies, []
            try:
                self._change_options.notifier.report_reloading()
                outcome = await self._reload()
            except Exception as error:
                log.error("a reload failed", exc_info=error)
                outcome = ChangeOutcome(False, str(error) or type(error).__name__)
            if outcome.ok:
                log.info("%s", outcome.message)
            else:
                log.error("the configuration is not reloaded, the old one stays in force: %s", outcome.message)
            self._change_options.notifier.report_ready(
                outcome.message if outcome.ok else "running; the last change was refused"
            )
            for reply in replies:
                reply(outcome)

    async def _reload(self) -> ChangeOutcome:
        """Reloads the configuration, and returns the outcome:

        - `configuration_source.propose` reads and checks the new configuration.
        - The worker's command `prepare` opens the new configuration.
        - `configuration_source.accept` puts the new configuration in force. If `accept` fails, the worker's command
          `discard` drops the new configuration, and the reload has failed.
        - The worker's command `switch` makes the worker use the new configuration.

        Raises the errors of `switch` and `discard`."""
        assert self._run_command is not None
        configuration_source = self._change_options.configuration_source
        try:
            proposal = await asyncio.to_thread(configuration_source.propose)  # reads files and the database
            await self._run_command("prepare", proposal.configuration)
        except ChangeRefused as error:
            return ChangeOutcome(False, error.message)
        except Exception as error:
            message = getattr(error, "message", None)
            if not isinstance(message, str):
                log.error("the new configuration cannot be opened", exc_info=error)
            return ChangeOutcome(False, str(message or error))
        try:
            configuration_source.accept(proposal)
        except Exception as error:
            log.error("the new configuration cannot be put in force", exc_info=error)
            await self._run_command("discard", b"")
            return ChangeOutcome(False, str(error) or type(error).__name__)
        await self._run_command("switch", b"")
        return reload_outcome(proposal)
