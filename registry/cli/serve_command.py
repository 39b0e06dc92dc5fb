"""`entrepot serve`."""

from __future__ import annotations

import shlex
import socket
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

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
from registry.config import DOCKER_HUB, Settings

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

    from registry.server.gate.listener import ListenerOptions

HELP = "Run the registry until SIGTERM or Ctrl-C."
EXAMPLES = """\b
Examples:
  entrepot serve
  entrepot serve --data /srv/entrepot --listen 0.0.0.0:5000
  ENTREPOT_TLS__CERTIFICATE=cert.pem ENTREPOT_TLS__KEY=key.pem entrepot serve
  entrepot serve --config /etc/entrepot/entrepot.toml
  entrepot serve --mirror docker.io --mirror ghcr.io

Every setting can be set by a flag, an ENTREPOT_* variable or the file; `entrepot config` shows them all."""


def serve(
    config: ConfigOption = None,
    data: DataOption = None,
    listen: ListenOption = None,
    workers: WorkersOption = None,
    read_only: ReadOnlyOption = None,
    mirror: MirrorOption = None,
    insecure_open: InsecureOpenOption = None,
) -> None:
    flags: dict[str, object] = {"data": data, "listen": listen, "workers": workers, "read_only": read_only}
    flags |= {"mirror": mirror or None, "insecure_open": insecure_open}
    settings = load_or_fail(config, **flags).settings
    with one_line_errors():
        raise typer.Exit(run_server(settings))


def run_server(settings: Settings) -> int:
    """Serves; the exit code. The socket is bound first, so that a port below 1024 works although the process then
    becomes the data directory's owner. Raises DataDirectoryError, OwnerError."""
    from registry.app import create_app
    from registry.auth.assembly import check_auth_files
    from registry.auth.external.openid_provider import ProviderInvalid
    from registry.auth.password.htpasswd import HtpasswdError
    from registry.backend import preload_mirrors
    from registry.cli.data_owner import become_owner
    from registry.client_addresses import is_loopback
    from registry.config.auth_settings import has_external_logins
    from registry.log_output import log_to_stderr
    from registry.server.gate.certificates import CertificateError
    from registry.server.gate.listener import ListenError, address_of, bind
    from registry.server.process.run import serve as serve_app
    from registry.service_factory import shared_rate_limit
    from storage.composition import has_had_account, prepare_data_dir

    try:
        bound = bind(settings.listen)
    except ListenError as error:
        fail(str(error))
    log_to_stderr(settings.log_level)
    with bound:
        try:
            door = build_gate(settings)
        except CertificateError as error:
            fail(str(error))
        preload_mirrors(settings)
        become_owner(settings.data)
        try:
            check_auth_files(settings)
        except (HtpasswdError, ProviderInvalid) as error:
            fail(str(error))
        prepare_data_dir(settings.data)
        closed = has_had_account(settings.data) or has_external_logins(
            settings.auth, settings.issuer, settings.oidc.issuer
        )
        try:
            check_insecure_open(
                bound_is_loopback=is_loopback(bound.getsockname()[0]),
                closed=closed,
                insecure_open=settings.insecure_open,
            )
        except InsecureOpenError as error:
            fail(str(error))
        text = startup_banner(settings, address_of(bound), bound, closed=closed)
        rate_limit = shared_rate_limit(settings)
        return serve_app(
            lambda: cast(
                "ASGI3Application", create_app(settings, rate_limit=rate_limit)
            ),  # starlette types it otherwise
            sockets=[bound],
            workers=settings.workers,
            shutdown_grace=settings.shutdown_grace,
            on_ready=lambda: _print_banner(text),
            door=door,
        )


def _print_banner(text: str) -> None:
    with suppress(OSError):  # where the output's own disk is full, it serves all the same
        typer.echo(text)


def build_gate(settings: Settings) -> ListenerOptions:
    """What stands before the requests. To be made as root, who may be the only one to read the key. Raises
    CertificateError."""
    from registry.server.gate.certificates import CertificateError, CertificateFiles, Certificates
    from registry.server.gate.listener import ListenerOptions
    from registry.server.gate.per_address_limit import PerAddressLimit
    from registry.server.gate.trusted_proxies import TrustedProxies

    tls, most = settings.tls, settings.limits.connections_per_address
    client_auth = tls.client_auth or ("off" if tls.client_ca is None else "required")
    if tls.certificate is None and (tls.key, tls.client_ca, tls.client_auth) != (None, None, None):
        raise CertificateError("[tls] says something, but names no certificate; set tls.certificate")
    if client_auth != "off" and tls.client_ca is None:
        raise CertificateError(f"tls.client_auth is {client_auth}, but nobody signs for clients; set tls.client_ca")
    certificates = None
    if tls.certificate is not None:
        certificates = Certificates(CertificateFiles(tls.certificate, tls.key, tls.client_ca, client_auth))
    return ListenerOptions(
        certificates,
        TrustedProxies(map(ip_network, settings.trusted_proxies)) if settings.trusted_proxies else None,
        PerAddressLimit(most, settings.workers) if most else None,
    )


class InsecureOpenError(Exception):
    """The registry would be open to everybody who reaches it. The text is one line for a person."""


def check_insecure_open(*, bound_is_loopback: bool, closed: bool, insecure_open: bool) -> None:
    """Without accounts everybody may do everything, so only this machine may reach the registry, unless somebody said
    that the others may. Raises OpenError."""
    if not (bound_is_loopback or closed or insecure_open):
        raise InsecureOpenError(
            "this address can be reached from other machines, and there are no accounts: add one with "
            "`entrepot user add NAME --admin`, or let everybody push and delete with --insecure-open"
        )


def startup_banner(settings: Settings, address: str, bound: socket.socket, *, closed: bool) -> str:
    """What a person needs next. The first line is for programs as well and keeps its form."""
    from registry import __version__

    scheme = "http" if settings.tls.certificate is None else "https"
    lines = [f"Entrepot {__version__} listens on {scheme}://{address}", f"  data      {Path(settings.data).resolve()}"]
    if settings.public_url:
        lines.append(f"  public    {settings.public_url}")
    host = urlsplit(settings.public_url).netloc if settings.public_url else docker_address(bound)
    if settings.read_only:
        lines.append("  mode      read-only: pushes and deletes are refused")
        lines.append(f"  try       docker pull {host}/team/busybox")
    else:
        name = f"{host}/team/busybox"
        lines.append(f"  try       docker pull busybox && docker tag busybox {name} && docker push {name}")
    if settings.upstream:
        lines += _mirror_lines(settings, host)
    if not closed:
        lines.append("  note      there are no accounts: whoever reaches this address can push and delete")
        lines.append(f"  accounts  {_add_account_command(settings)}")
    lines.append("  stop      Ctrl-C, or SIGTERM to this process")
    return "\n".join(lines)


def _add_account_command(settings: Settings) -> str:
    """The command for the first one."""
    where = f" --data {shlex.quote(str(settings.data.resolve()))}" if settings.data != Path("data") else ""
    return f"entrepot user add NAME --admin{where}"


def _mirror_lines(settings: Settings, host: str) -> list[str]:
    names = [f"{each.name} (default)" if each.default else each.name for each in settings.upstream]
    first = next((each for each in settings.upstream if each.default), settings.upstream[0])
    name = "ubuntu" if first.name == DOCKER_HUB else "NAME"
    path = name if first.default else f"{first.name}/{name}"
    return [f"  mirrors   {', '.join(names)}", f"  pull      docker pull {host}/{path}"]


def docker_address(bound: socket.socket) -> str:
    """HOST:PORT as a docker on this machine can use it: docker trusts plain HTTP on loopback addresses."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::", "::1"):
        host = "localhost"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
