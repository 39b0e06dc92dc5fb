"""The command `entrepot serve`: checks the settings and the data directory, and runs the server."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from registry.cli.options import (
    ConfigOption,
    DataOption,
    InsecureOpenOption,
    ListenOption,
    MirrorOption,
    ReadOnlyOption,
    WorkersOption,
    fail,
    given_flags,
    load_server_settings_or_fail,
    one_line_errors,
)
from registry.cli.output import print_text
from registry.config import Settings

if TYPE_CHECKING:
    from registry.app import Entrepot
    from registry.asgi import AsgiApp

HELP = "Run the registry in the foreground. Ctrl-C or SIGTERM stops it."
EXAMPLES = """\b
Examples:
  entrepot serve
  entrepot serve --data /srv/entrepot --listen 0.0.0.0:5000
  ENTREPOT_TLS__CERTIFICATE=cert.pem ENTREPOT_TLS__KEY=key.pem entrepot serve
  entrepot serve --config /etc/entrepot/entrepot.toml
  entrepot serve --mirror docker.io --mirror ghcr.io

Each setting can come from a flag, an ENTREPOT_* variable or the settings file. `entrepot config` shows all settings."""


def serve(
    config: ConfigOption = None,
    data: DataOption = None,
    listen: ListenOption = None,
    workers: WorkersOption = None,
    read_only: ReadOnlyOption = None,
    mirror: MirrorOption = None,
    insecure_open: InsecureOpenOption = None,
) -> None:
    """Runs the server and ends the command with the server's exit code."""
    flags = {
        "data": data,
        "listen": listen,
        "workers": workers,
        "read_only": read_only,
        "mirror": mirror,
        "insecure_open": insecure_open,
    }
    settings = load_server_settings_or_fail(config, **flags).settings
    with one_line_errors():
        raise typer.Exit(run_server(settings, given_flags(flags), config))


def run_server(settings: Settings, flags: Mapping[str, Any], config: Path | None) -> int:
    """Runs the server until a signal stops it, and returns the exit code. `flags` and `config`: the command's flags and
    its settings file. A reload reads the settings from them again.

    `entrepot restart` makes a new version of the program take over from a running server of the old version. Before
    that, the old version starts a process of the new version, which only checks whether the new version can take over.
    In this process, the function makes the check and returns 0.

    In every other process, the function first binds the port, unless systemd or an old version of the program has
    opened it already. If root has started the command, the process then becomes the user who owns the data directory.
    The port is bound before that, because only root may bind a port below 1024.

    Ends the command with an error message if it cannot bind the port, or if a file or a setting cannot be used. Raises
    DataDirectoryError if the data directory cannot be used, and OwnerError if the process may not become the user who
    owns it."""
    gc.disable()  # during these imports, garbage collection takes time and finds nothing
    from pydantic.warnings import UnsupportedFieldAttributeWarning

    from registry.app import create_app
    from registry.cli.live_configuration import LiveConfiguration
    from registry.cli.server_preparation import prepare_server
    from registry.cli.startup_banner import startup_banner
    from registry.cli.takeover import check_metrics_port, check_takeover, listening_sockets, make_successor
    from registry.client_addresses import is_loopback_address
    from registry.live_app import LiveApp
    from registry.log_output import log_to_stderr
    from registry.server.gate.listener import address_of
    from registry.server.process.live_change import ChangeRefused
    from registry.server.process.live_change_options import LiveChangeOptions
    from registry.server.process.run import serve as serve_app
    from registry.server.process.successor import CheckTask, take_handover
    from registry.server.process.systemd import Notifier
    from registry.service_factory import RateLimitMemory, shared_rate_limit
    from registry.status.worker_report import new_server_run
    from registry.telemetry.metrics import CountsMemory
    from registry.telemetry.otel_configuration import OtelUnavailable, check_otel
    from registry.telemetry.telemetry import Telemetry
    from storage.composition import layout_of

    gc.enable()
    try:
        # What a running old version of the program wants from this process. `CheckTask`: to check whether this version
        # can take over; its `facts` are facts about the old version, such as its data directory. `Handover`: to take
        # over. None: no old version has started this process.
        start_request = take_handover(os.environ)
        check_otel(settings.otel.endpoint)
    except (ChangeRefused, OtelUnavailable) as error:
        fail(str(error))
    if isinstance(start_request, CheckTask):
        check_takeover(settings, start_request.facts)
        return 0
    handover = start_request
    sockets, metrics_socket = listening_sockets(settings, handover)
    all_sockets = sockets if metrics_socket is None else [*sockets, metrics_socket]
    log_to_stderr(settings.log_level, settings.log_format)
    # This warning does not help operators who read the log. FastAPI itself suppresses it with
    # `warnings.catch_warnings`, which is not reliable while other threads run.
    warnings.simplefilter("ignore", UnsupportedFieldAttributeWarning)
    with ExitStack() as stack:
        for sock in all_sockets:
            stack.enter_context(sock)
        bound_to_loopback = all(is_loopback_address(sock.getsockname()[0]) for sock in sockets)
        addresses = [address_of(sock) for sock in all_sockets]
        if metrics_socket is not None:
            check_metrics_port(addresses[:-1], addresses[-1])
        listener_options, requires_login = prepare_server(
            settings, bound_to_loopback=bound_to_loopback, may_migrate=handover is None
        )
        banner = startup_banner(settings, addresses[0], sockets[0], requires_login=requires_login)
        # These objects are created before the workers are forked, so that all workers share them.
        rate_memory = RateLimitMemory()
        server_run = new_server_run()  # the random id of this server, and the time of its start
        # After a takeover, the metrics continue the counts of the old version.
        telemetry = Telemetry(
            settings,
            None if metrics_socket is None else metrics_socket.getsockname()[1],
            inherited=None if handover is None or handover.counts is None else CountsMemory(*handover.counts),
        )
        configuration = LiveConfiguration(settings, flags, config, addresses, bound_to_loopback=bound_to_loopback)

        def make_app(settings: Settings, starts_background_work: bool) -> Entrepot:
            rate_limit = shared_rate_limit(settings, rate_memory)
            return create_app(
                settings,
                rate_limit=rate_limit,
                telemetry=telemetry,
                server_run=server_run,
                starts_background_work=starts_background_work,
            )

        return serve_app(
            lambda: cast("AsgiApp", LiveApp(configuration.settings, make_app)),
            sockets=all_sockets,
            workers=settings.workers,
            shutdown_grace=settings.shutdown_grace,
            restart_grace=settings.restart_grace,
            on_ready=lambda: _print_banner(banner),
            listener_options=listener_options,
            change_options=LiveChangeOptions(
                configuration,
                control=layout_of(settings.data).control,
                # Starts the new version when `entrepot restart` asks for it.
                successor=make_successor(settings, addresses, bound_to_loopback=bound_to_loopback),
                handover=handover,
                counts_memory=telemetry.metrics.memory,
                notifier=Notifier(os.environ.get("NOTIFY_SOCKET")),
            ),
        )


def _print_banner(text: str) -> None:
    """Prints the banner. Ignores a failed write, for example to a full disk."""
    with suppress(OSError):
        print_text(text)
