"""The startup banner: the lines that `entrepot serve` prints when it is ready."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path
from urllib.parse import urlsplit

from registry.config import DOCKER_HUB, Settings


def startup_banner(settings: Settings, address: str, listener: socket.socket, *, requires_login: bool) -> str:
    """Returns the lines, with the address, the data directory and example commands. The text does not end with a
    newline. Other programs parse the first line, so its format must stay the same in all versions.

    `address`: HOST:PORT of the socket `listener`. `requires_login`: whether clients must log in."""
    from registry import __version__

    scheme = "http" if settings.tls.certificate is None else "https"
    lines = [f"Entrepot {__version__} listens on {scheme}://{address}", f"  data      {Path(settings.data).resolve()}"]
    if settings.public_url:
        lines.append(f"  public    {settings.public_url}")
    host = urlsplit(settings.public_url).netloc if settings.public_url else docker_address(listener)
    if settings.read_only:
        lines.append("  mode      read-only: pushes and deletes are refused")
        lines.append(f"  try       docker pull {host}/team/busybox")
    else:
        name = f"{host}/team/busybox"
        lines.append(f"  try       docker pull busybox && docker tag busybox {name} && docker push {name}")
    if settings.upstream:
        lines += _mirror_lines(settings, host)
    if not requires_login:
        lines.append("  note      there are no accounts: whoever reaches this address can push and delete")
        lines.append(f"  accounts  {_add_account_command(settings)}")
    lines.append("  stop      Ctrl-C, or SIGTERM to this process")
    return "\n".join(lines)


def docker_address(listener: socket.socket) -> str:
    """Returns the HOST:PORT at which docker on this machine reaches the listening socket. The host is `localhost` if
    the socket has a wildcard address or `::1`. By default, docker accepts plain HTTP from `localhost`, but not from
    `::1`."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::", "::1"):
        host = "localhost"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _add_account_command(settings: Settings) -> str:
    """Returns the command that adds the first account, an administrator, to this data directory."""
    data_option = f" --data {shlex.quote(str(settings.data.resolve()))}" if settings.data != Path("data") else ""
    return f"entrepot user add NAME --admin{data_option}"


def _mirror_lines(settings: Settings, host: str) -> list[str]:
    """Returns two lines about the mirrored registries (the *upstreams*): their names, and an example of a pull. The
    example uses the default upstream, or the first upstream if there is no default."""
    names = [f"{upstream.name} (default)" if upstream.default else upstream.name for upstream in settings.upstream]
    example = next((upstream for upstream in settings.upstream if upstream.default), settings.upstream[0])
    repository = "ubuntu" if example.name == DOCKER_HUB else "NAME"
    path = repository if example.default else f"{example.name}/{repository}"
    return [f"  mirrors   {', '.join(names)}", f"  pull      docker pull {host}/{path}"]
