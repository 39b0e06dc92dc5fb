"""The lines that `entrepot serve` prints when it is ready."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path
from urllib.parse import urlsplit

from registry.config import DOCKER_HUB, Settings


def startup_banner(settings: Settings, address: str, bound: socket.socket, *, closed: bool) -> str:
    """Returns the address, the data directory and the commands to try first. `address` is HOST:PORT of `bound`;
    `closed` says whether clients must log in. Programs read the first line, so its form stays."""
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


def docker_address(bound: socket.socket) -> str:
    """Returns HOST:PORT as docker on this machine can use it. docker trusts plain HTTP on IPv4 loopback addresses."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::", "::1"):
        host = "localhost"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _add_account_command(settings: Settings) -> str:
    where = f" --data {shlex.quote(str(settings.data.resolve()))}" if settings.data != Path("data") else ""
    return f"entrepot user add NAME --admin{where}"


def _mirror_lines(settings: Settings, host: str) -> list[str]:
    names = [f"{each.name} (default)" if each.default else each.name for each in settings.upstream]
    first = next((each for each in settings.upstream if each.default), settings.upstream[0])
    name = "ubuntu" if first.name == DOCKER_HUB else "NAME"
    path = name if first.default else f"{first.name}/{name}"
    return [f"  mirrors   {', '.join(names)}", f"  pull      docker pull {host}/{path}"]
