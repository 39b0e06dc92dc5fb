"""The command `entrepot serve`: checks the settings and the data directory, and runs the server.

A registry is *closed* if clients must log in: it has or had accounts, or the settings name another source of accounts,
such as an htpasswd file. Otherwise it is *open*: anyone who can connect can pull, push and delete.
"""

from __future__ import annotations

import socket
from contextlib import nullcontext, suppress
from ipaddress import ip_network
from typing import TYPE_CHECKING, cast

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
    load_or_fail,
    one_line_errors,
)
from registry.config import Settings

if TYPE_CHECKING:
    from registry.asgi import AsgiApp
    from registry.server.gate.listener import ListenerOptions

HELP = "Run the registry in the foreground. Ctrl-C or SIGTERM stops it."
EXAMPLES = """\b
Examples:
  entrepot serve
  entrepot serve --data /srv/entrepot --listen 0.0.0.0:5000
  ENTREPOT_TLS__CERTIFICATE=cert.pem ENTREPOT_TLS__KEY=key.pem entrepot serve
  entrepot serve --config /etc/entrepot/entrepot.toml
  entrepot serve --mirror docker.io --mirror ghcr.io

Each setting can come from a flag, an ENTREPOT_* variable or the settings file. `entrepot config` shows them all."""


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
    settings = load_or_fail(
        config,
        data=data,
        listen=listen,
        workers=workers,
        read_only=read_only,
        mirror=mirror,
        insecure_open=insecure_open,
    ).settings
    with one_line_errors():
        raise typer.Exit(run_server(settings))


def run_server(settings: Settings) -> int:
    """Runs the server until a signal stops it, and returns the exit code.

    If root starts the command and the data directory belongs to another user, the process becomes that user. Before
    that, it binds the port, because only root may bind a port below 1024.

    Ends the command with an error message if it cannot bind the port, or if a file or a setting cannot be used. Raises
    DataDirectoryError if the data directory cannot be used, and OwnerError if the process may not become its owner."""
    from registry.app import create_app
    from registry.cli.startup_banner import startup_banner
    from registry.log_output import log_to_stderr
    from registry.server.gate.listener import ListenError, address_of, bind
    from registry.server.process.run import serve as serve_app
    from registry.service_factory import shared_rate_limit
    from registry.telemetry.telemetry import Telemetry
    from registry.telemetry.tracing import TracingUnavailable, check_tracing

    try:
        listener = bind(settings.listen)
        metrics_address = settings.metrics.listen if settings.metrics.enabled else None
        metrics_listener = None if metrics_address is None else bind(metrics_address)
    except ListenError as error:
        fail(str(error))
    try:
        check_tracing(settings.otel.endpoint)
    except TracingUnavailable as error:
        fail(str(error))
    log_to_stderr(settings.log_level, settings.log_format)
    with listener, metrics_listener or nullcontext():
        listener_options, closed = _prepare(settings, listener)
        banner = startup_banner(settings, address_of(listener), listener, closed=closed)
        # Made before the workers are forked, so that all of them share it.
        rate_limit = shared_rate_limit(settings)
        telemetry = Telemetry(settings, None if metrics_listener is None else metrics_listener.getsockname()[1])
        return serve_app(
            lambda: cast("AsgiApp", create_app(settings, rate_limit=rate_limit, telemetry=telemetry)),
            sockets=[listener] if metrics_listener is None else [listener, metrics_listener],
            workers=settings.workers,
            shutdown_grace=settings.shutdown_grace,
            on_ready=lambda: _print_banner(banner),
            listener_options=listener_options,
        )


def _prepare(settings: Settings, listener: socket.socket) -> tuple[ListenerOptions, bool]:
    """Prepares the start of the server: makes the process run as the user who owns the data directory, creates the data
    directory if it is missing, and checks the files for TLS and for logins that the settings name. Returns the
    listener's options and whether the registry is closed. Ends the command with an error message if a check fails."""
    from registry.auth.assembly import check_auth_files
    from registry.auth.external.openid_provider import ProviderInvalid
    from registry.auth.password.htpasswd import HtpasswdError
    from registry.backend import preload_mirrors
    from registry.cli.data_owner import become_owner
    from registry.client_addresses import is_loopback
    from registry.config.auth_settings import has_external_logins
    from registry.server.gate.certificates import CertificateError
    from storage.composition import has_had_account, prepare_data_dir

    try:
        options = build_listener_options(settings)
        preload_mirrors(settings)
        become_owner(settings.data)
        check_auth_files(settings)
        prepare_data_dir(settings.data)
        has_other_logins = has_external_logins(settings.auth, settings.issuer, settings.oidc.issuer)
        closed = has_other_logins or has_had_account(settings.data)
        check_insecure_open(
            bound_to_loopback=is_loopback(listener.getsockname()[0]),
            closed=closed,
            insecure_open=settings.insecure_open,
        )
    except (CertificateError, HtpasswdError, ProviderInvalid, InsecureOpenError) as error:
        fail(str(error))
    return options, closed


def _print_banner(text: str) -> None:
    """Prints the banner. Ignores a failed write, for example to a full disk, because the server does not need the
    banner."""
    with suppress(OSError):
        typer.echo(text)


def build_listener_options(settings: Settings) -> ListenerOptions:
    """Returns the options of the listener, which apply to a connection before a request is read: TLS, trusted proxies
    and the limit of connections for each client address. Raises CertificateError if the TLS files or settings cannot be
    used.

    If root started the command, this must run while the process is still root, because only root may be able to read
    the TLS key."""
    from registry.server.gate.certificates import CertificateError, CertificateFiles, Certificates
    from registry.server.gate.listener import ListenerOptions
    from registry.server.gate.per_address_limit import PerAddressLimit
    from registry.server.gate.trusted_proxies import TrustedProxies

    tls, max_connections = settings.tls, settings.limits.connections_per_address
    client_auth = tls.client_auth or ("off" if tls.client_ca is None else "required")
    if tls.certificate is None and (tls.key, tls.client_ca, tls.client_auth) != (None, None, None):
        raise CertificateError("[tls] has settings, but names no certificate; set tls.certificate")
    if client_auth != "off" and tls.client_ca is None:
        raise CertificateError(
            f"tls.client_auth is {client_auth}, but there is no authority for client certificates: set tls.client_ca "
            "to the file with the certificate of the authority that signs them"
        )
    certificates = None
    if tls.certificate is not None:
        certificates = Certificates(CertificateFiles(tls.certificate, tls.key, tls.client_ca, client_auth))
    return ListenerOptions(
        certificates=certificates,
        proxies=TrustedProxies(map(ip_network, settings.trusted_proxies)) if settings.trusted_proxies else None,
        per_address_limit=PerAddressLimit(max_connections, settings.workers) if max_connections else None,
    )


class InsecureOpenError(Exception):
    """The registry would be open and other machines could reach it. The text is one line for people."""


def check_insecure_open(*, bound_to_loopback: bool, closed: bool, insecure_open: bool) -> None:
    """Raises InsecureOpenError if the registry is open and other machines can reach it, unless the setting
    `insecure_open` allows this. `bound_to_loopback`: whether the socket is bound to a loopback address, which only this
    machine can reach."""
    if not (bound_to_loopback or closed or insecure_open):
        raise InsecureOpenError(
            "this address can be reached from other machines, and there are no accounts: add one with "
            "`entrepot user add NAME --admin`, or let anyone push and delete with --insecure-open"
        )
