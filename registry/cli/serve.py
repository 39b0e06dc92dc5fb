"""`entrepot serve`."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

import typer

from registry.cli.options import (
    ConfigFile,
    Data,
    Listen,
    Mirror,
    ReadOnly,
    Workers,
    fail,
    load_or_fail,
    one_line_errors,
)
from registry.config import HUB, Settings

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

HELP = "Run the registry until SIGTERM or Ctrl-C."
EXAMPLES = """\b
Examples:
  entrepot serve
  entrepot serve --data /srv/entrepot --listen 0.0.0.0:5000
  entrepot serve --config /etc/entrepot/entrepot.toml
  entrepot serve --mirror docker.io --mirror ghcr.io

Every setting can be set by a flag, an ENTREPOT_* variable or the file; `entrepot config` shows them all."""


def serve(
    config: ConfigFile = None,
    data: Data = None,
    listen: Listen = None,
    workers: Workers = None,
    read_only: ReadOnly = None,
    mirror: Mirror = None,
) -> None:
    flags = {"data": data, "listen": listen, "workers": workers, "read_only": read_only, "mirror": mirror or None}
    settings = load_or_fail(config, **flags).settings
    with one_line_errors():
        raise typer.Exit(run(settings))


def run(settings: Settings) -> int:
    """Serves; the exit code. The socket is bound first, so that a port below 1024 works although the process then
    becomes the data directory's owner. Raises DataDirectoryError, OwnerError."""
    from registry.app import create_app
    from registry.cli.owner import become_owner
    from registry.logs import log_to_stderr
    from registry.opening import load_mirrors
    from registry.server.listen import ListenError, address_of, bind
    from registry.server.run import serve as serve_app
    from storage.opening import prepare

    try:
        bound = bind(settings.listen)
    except ListenError as error:
        fail(str(error))
    log_to_stderr(settings.log_level)
    load_mirrors(settings)
    text = greeting(settings, address_of(bound), bound)
    with bound:
        become_owner(settings.data)
        prepare(settings.data)
        return serve_app(
            lambda: cast("ASGI3Application", create_app(settings)),  # ASGI, typed otherwise by starlette
            sockets=[bound],
            workers=settings.workers,
            shutdown_grace=settings.shutdown_grace,
            on_ready=lambda: typer.echo(text),
        )


def greeting(settings: Settings, address: str, bound: socket.socket) -> str:
    """What a person needs next. The first line is for programs as well and keeps its form."""
    from registry import __version__

    lines = [f"Entrepot {__version__} listens on http://{address}", f"  data      {Path(settings.data).resolve()}"]
    if settings.public_url:
        lines.append(f"  public    {settings.public_url}")
    host = urlsplit(settings.public_url).netloc if settings.public_url else reachable(bound)
    if settings.read_only:
        lines.append("  mode      read-only: pushes and deletes are refused")
        lines.append(f"  try       docker pull {host}/team/busybox")
    else:
        name = f"{host}/team/busybox"
        lines.append(f"  try       docker pull busybox && docker tag busybox {name} && docker push {name}")
    if settings.upstream:
        lines += _mirrored(settings, host)
    if not is_loopback(bound):
        lines.append("  note      there are no accounts yet: whoever reaches this address can push and delete")
    lines.append("  stop      Ctrl-C, or SIGTERM to this process")
    return "\n".join(lines)


def _mirrored(settings: Settings, host: str) -> list[str]:
    names = [f"{each.name} (default)" if each.default else each.name for each in settings.upstream]
    first = next((each for each in settings.upstream if each.default), settings.upstream[0])
    name = "ubuntu" if first.name == HUB else "NAME"
    path = name if first.default else f"{first.name}/{name}"
    return [f"  mirrors   {', '.join(names)}", f"  pull      docker pull {host}/{path}"]


def reachable(bound: socket.socket) -> str:
    """HOST:PORT as a docker on this machine can use it: docker trusts plain HTTP on loopback addresses."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::", "::1"):
        host = "localhost"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(bound: socket.socket) -> bool:
    host: str = bound.getsockname()[0]
    return host.startswith("127.") or host == "::1"
