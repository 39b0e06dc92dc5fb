"""`entrepot client`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from registry.cli.options import USAGE_ERROR, ConfigOption, DataOption, ListenOption, MirrorOption, fail, load_or_fail
from registry.config import Settings, Upstream
from registry.config.mirror_settings import DOCKER_HUB

if TYPE_CHECKING:
    from registry.cli.client_setup import MirroredHost

HELP = "Print what to set up so that a client pulls through this registry."
EXAMPLES = """\b
Examples:
  entrepot client docker --url http://registry.example.com:5000
  entrepot client podman > /etc/containers/registries.conf.d/50-entrepot.conf
  entrepot client containerd --upstream docker.io > /etc/containerd/certs.d/docker.io/hosts.toml
  entrepot client buildkit --config /etc/entrepot/entrepot.toml

The files go to stdout, what to do with them to stderr. Address and upstreams come from the settings; without any
upstream there it is docker.io."""


class ClientProgram(StrEnum):
    docker = "docker"
    containerd = "containerd"
    podman = "podman"
    buildkit = "buildkit"


def client(
    program: Annotated[ClientProgram, typer.Argument(help="Which client.", show_default=False)],
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            "-u",
            metavar="URL",
            help="This registry as the client reaches it. [default: public_url, else listen]",
        ),
    ] = None,
    upstream: Annotated[
        list[str] | None,
        typer.Option("--upstream", metavar="NAME", help="Only this upstream; may be given again. [default: all]"),
    ] = None,
    config: ConfigOption = None,
    data: DataOption = None,
    listen: ListenOption = None,
    mirror: MirrorOption = None,
) -> None:
    """`data` changes nothing: it is taken so that the options of `serve` can stay on the line."""
    from registry.cli import client_setup

    settings = load_or_fail(config, data=data, listen=listen, mirror=mirror or None).settings
    address = client_setup.RegistryAddress(_checked_url(url) if url else _own_url(settings))
    upstreams = _upstreams(settings, upstream or [])
    if program is ClientProgram.docker:
        _check_docker_default(settings, upstreams)
    setup = client_setup.SETUPS[program.value](address, upstreams)
    typer.echo("\n".join(text for _, text in setup.files), nl=False)
    for hint in setup.hints:
        typer.echo(f"# {hint}", err=True)


def _checked_url(url: str) -> str:
    try:
        checked = Settings(public_url=url if "://" in url else f"http://{url}").public_url
    except ValidationError as error:
        fail(f"--url: {error.errors()[0]['ctx']['error']}", USAGE_ERROR)
    assert checked is not None
    return checked


def _own_url(settings: Settings) -> str:
    """`public_url`, or the address it listens on. One that means "every address" is no address for a client."""
    if settings.public_url:
        return settings.public_url
    host, _, port = settings.listen.rpartition(":")
    if port == "0":
        fail("the settings leave the choice of the port to the server; name its address with --url", USAGE_ERROR)
    if host in ("", "0.0.0.0", "[::]", "::", "*"):
        typer.echo("# this is for clients on the same machine; for others name the address with --url", err=True)
        host = "localhost"
    scheme = "http" if settings.tls.certificate is None else "https"
    return _checked_url(f"{scheme}://{host}:{port}")


def _upstreams(settings: Settings, wanted: list[str]) -> list[MirroredHost]:
    from registry.cli.client_setup import mirrored_hosts

    if not settings.upstream:
        return [each for name in dict.fromkeys(wanted or [DOCKER_HUB]) for each in mirrored_hosts(_upstream(name))]
    known = [each for upstream in settings.upstream for each in mirrored_hosts(upstream)]
    names = dict.fromkeys(name for each in known for name in (each.name, each.prefix))
    if strange := next((name for name in wanted if name not in names), None):
        fail(f"--upstream: {strange} is not mirrored here; these are: {', '.join(names)}", USAGE_ERROR)
    if not wanted:
        return known
    return [each for name in dict.fromkeys(wanted) for each in known if _matches_name(each, name, known)]


def _matches_name(each: MirroredHost, name: str, known: list[MirroredHost]) -> bool:
    """A prefix means that one alone; a name that is none means all of its upstream's."""
    return each.prefix == name or (each.name == name and all(other.prefix != name for other in known))


def _upstream(name: str) -> Upstream:
    try:
        return Upstream(name=name)
    except ValidationError as error:
        fail(f"--upstream: {error.errors()[0]['ctx']['error']}", USAGE_ERROR)


def _check_docker_default(settings: Settings, upstreams: list[MirroredHost]) -> None:
    """A mirror in daemon.json is asked for `library/ubuntu`, with nothing that says "of Docker Hub"."""
    if (
        any(each.name == DOCKER_HUB for each in upstreams)
        and settings.upstream
        and settings.default_upstream != DOCKER_HUB
    ):
        fail(
            "docker asks a mirror for names without a host, and here they do not mean docker.io; "
            "set default = true for the upstream docker.io",
            USAGE_ERROR,
        )
