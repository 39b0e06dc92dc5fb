"""The command `entrepot client`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from registry.cli.options import USAGE_ERROR, ConfigOption, DataOption, ListenOption, MirrorOption, fail, load_or_fail
from registry.cli.registry_address import RegistryAddress, client_address, listens_everywhere
from registry.config import Settings, Upstream
from registry.config.mirror_settings import DOCKER_HUB

if TYPE_CHECKING:
    from registry.cli.client_setup import MirroredHost

HELP = "Print the configuration that a client needs to pull through here."
EXAMPLES = """\b
Examples:
  entrepot client docker --url http://registry.example.com:5000
  entrepot client podman > /etc/containers/registries.conf.d/50-entrepot.conf
  entrepot client containerd --upstream docker.io > /etc/containerd/certs.d/docker.io/hosts.toml
  entrepot client buildkit --config /etc/entrepot/entrepot.toml

stdout gets the files, stderr says what to do with them. The address and the upstreams come from the settings;
if the settings name no upstream, the files are for docker.io."""


class ClientProgram(StrEnum):
    docker = "docker"
    containerd = "containerd"
    podman = "podman"
    buildkit = "buildkit"


def client(
    program: Annotated[ClientProgram, typer.Argument(help="The client to configure.", show_default=False)],
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            "-u",
            metavar="URL",
            help="This registry's address as the client reaches it. [default: public_url, else listen]",
        ),
    ] = None,
    upstream: Annotated[
        list[str] | None,
        typer.Option("--upstream", metavar="NAME", help="Only this upstream. Repeat for more. [default: all]"),
    ] = None,
    config: ConfigOption = None,
    data: DataOption = None,
    listen: ListenOption = None,
    mirror: MirrorOption = None,
) -> None:
    """Prints the files on stdout and the hints on stderr. `data` has no effect here; the command accepts it so that the
    options of `entrepot serve` can be reused unchanged."""
    from registry.cli import client_setup

    settings = load_or_fail(config, data=data, listen=listen, mirror=mirror).settings
    address = _checked_address(url) if url else _own_address(settings)
    upstreams = _upstreams(settings, upstream or [])
    if program is ClientProgram.docker:
        _check_docker_default(settings, upstreams)
    setup = client_setup.SETUPS[program.value](address, upstreams)
    typer.echo("\n".join(text for _, text in setup.files), nl=False)
    for hint in setup.hints:
        typer.echo(f"# {hint}", err=True)


def _checked_address(url: str) -> RegistryAddress:
    try:
        checked = Settings(public_url=url if "://" in url else f"http://{url}").public_url
    except ValidationError as error:
        fail(f"--url: {error.errors()[0]['ctx']['error']}", USAGE_ERROR)
    assert checked is not None
    return RegistryAddress(checked)


def _own_address(settings: Settings) -> RegistryAddress:
    """Returns the address that the settings give. Prints a hint when only this machine can use it."""
    if not settings.public_url and settings.listen.endswith(":0"):
        fail(
            "with port 0 the server picks its port when it starts, so the settings do not hold it; "
            "name its address with --url",
            USAGE_ERROR,
        )
    if not settings.public_url and listens_everywhere(settings):
        typer.echo(
            "# this address is for clients on the same machine; for other machines name the address with --url",
            err=True,
        )
    return _checked_address(client_address(settings).url)


def _upstreams(settings: Settings, wanted: list[str]) -> list[MirroredHost]:
    from registry.cli.client_setup import mirrored_hosts

    if not settings.upstream:
        return [each for name in dict.fromkeys(wanted or [DOCKER_HUB]) for each in mirrored_hosts(_upstream(name))]
    known = [each for upstream in settings.upstream for each in mirrored_hosts(upstream)]
    names = dict.fromkeys(name for each in known for name in (each.name, each.prefix))
    if unknown := next((name for name in wanted if name not in names), None):
        fail(f"--upstream: {unknown} is not mirrored here; these are: {', '.join(names)}", USAGE_ERROR)
    if not wanted:
        return known
    return [each for name in dict.fromkeys(wanted) for each in known if _matches_name(each, name, known)]


def _matches_name(each: MirroredHost, name: str, known: list[MirroredHost]) -> bool:
    """Returns whether `name` selects this host. A prefix selects its own host; the name of an upstream that is not also
    a prefix selects all of the upstream's hosts."""
    return each.prefix == name or (each.name == name and all(other.prefix != name for other in known))


def _upstream(name: str) -> Upstream:
    try:
        return Upstream(name=name)
    except ValidationError as error:
        fail(f"--upstream: {error.errors()[0]['ctx']['error']}", USAGE_ERROR)


def _check_docker_default(settings: Settings, upstreams: list[MirroredHost]) -> None:
    """Ends the command when docker would get another registry's images: docker asks the mirror in daemon.json for
    `library/ubuntu` and does not say that it means Docker Hub."""
    if (
        any(each.name == DOCKER_HUB for each in upstreams)
        and settings.upstream
        and settings.default_upstream != DOCKER_HUB
    ):
        fail(
            "docker asks its mirror for names without a host, and here those names do not mean docker.io; "
            "set default = true for the upstream docker.io",
            USAGE_ERROR,
        )
