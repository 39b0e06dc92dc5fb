"""The command `entrepot serve`."""

from __future__ import annotations

import socket
from contextlib import suppress
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
    """Runs the server; the command's exit code is the server's."""
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
    """Serves until a signal stops it, and returns the exit code.

    Binds the port first, as root if need be, so that a port below 1024 works although the process then becomes the
    owner of the data directory. Raises DataDirectoryError and OwnerError."""
    from registry.app import create_app
    from registry.cli.startup_banner import startup_banner
    from registry.log_output import log_to_stderr
    from registry.server.gate.listener import ListenError, address_of, bind
    from registry.server.process.run import serve as serve_app
    from registry.service_factory import shared_rate_limit

    try:
        bound = bind(settings.listen)
    except ListenError as error:
        fail(str(error))
    log_to_stderr(settings.log_level)
    with bound:
        listener_options, closed = _prepare(settings, bound)
        banner = startup_banner(settings, address_of(bound), bound, closed=closed)
        rate_limit = shared_rate_limit(settings)
        return serve_app(
            lambda: cast("AsgiApp", create_app(settings, rate_limit=rate_limit)),
            sockets=[bound],
            workers=settings.workers,
            shutdown_grace=settings.shutdown_grace,
            on_ready=lambda: _print_banner(banner),
            listener_options=listener_options,
        )


def _prepare(settings: Settings, bound: socket.socket) -> tuple[ListenerOptions, bool]:
    """Checks all that must be right before the server starts, becomes the data directory's owner, and creates the data
    directory if it is missing. Returns the listener's options, and whether clients must log in."""
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
        external = has_external_logins(settings.auth, settings.issuer, settings.oidc.issuer)
        closed = external or has_had_account(settings.data)
        check_insecure_open(
            bound_is_loopback=is_loopback(bound.getsockname()[0]), closed=closed, insecure_open=settings.insecure_open
        )
    except (CertificateError, HtpasswdError, ProviderInvalid, InsecureOpenError) as error:
        fail(str(error))
    return options, closed


def _print_banner(text: str) -> None:
    with suppress(OSError):  # such as a full disk below a redirected stdout, which is no reason not to serve
        typer.echo(text)


def build_listener_options(settings: Settings) -> ListenerOptions:
    """Returns what the listener checks before it reads a request: TLS, trusted proxies, the limit for each address.
    Must run before root becomes the data directory's owner, since only root may be able to read the key. Raises
    CertificateError."""
    from registry.server.gate.certificates import CertificateError, CertificateFiles, Certificates
    from registry.server.gate.listener import ListenerOptions
    from registry.server.gate.per_address_limit import PerAddressLimit
    from registry.server.gate.trusted_proxies import TrustedProxies

    tls, most = settings.tls, settings.limits.connections_per_address
    client_auth = tls.client_auth or ("off" if tls.client_ca is None else "required")
    if tls.certificate is None and (tls.key, tls.client_ca, tls.client_auth) != (None, None, None):
        raise CertificateError("[tls] has settings, but names no certificate; set tls.certificate")
    if client_auth != "off" and tls.client_ca is None:
        raise CertificateError(
            f"tls.client_auth is {client_auth}, but nobody signs for clients; name their authority with tls.client_ca"
        )
    certificates = None
    if tls.certificate is not None:
        certificates = Certificates(CertificateFiles(tls.certificate, tls.key, tls.client_ca, client_auth))
    return ListenerOptions(
        certificates,
        TrustedProxies(map(ip_network, settings.trusted_proxies)) if settings.trusted_proxies else None,
        PerAddressLimit(most, settings.workers) if most else None,
    )


class InsecureOpenError(Exception):
    """Other machines could reach the registry although it has no accounts. The message is one line for people."""


def check_insecure_open(*, bound_is_loopback: bool, closed: bool, insecure_open: bool) -> None:
    """Checks that a registry without accounts is reachable from this machine alone, unless `insecure_open` allows more.
    Without accounts anyone who reaches it can push and delete. Raises InsecureOpenError."""
    if not (bound_is_loopback or closed or insecure_open):
        raise InsecureOpenError(
            "this address can be reached from other machines, and there are no accounts: add one with "
            "`entrepot user add NAME --admin`, or let anyone push and delete with --insecure-open"
        )
