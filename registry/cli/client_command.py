"""The command `entrepot client`: prints configuration files that make a client, such as docker, pull through this
registry's mirrors.

An *upstream* is a remote registry that this registry mirrors, such as `docker.io`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from registry.cli.options import USAGE_ERROR, ConfigOption, DataOption, ListenOption, MirrorOption, fail, load_or_fail
from registry.cli.registry_address import RegistryAddress, listens_everywhere, registry_address
from registry.config import Settings, Upstream
from registry.config.mirror_settings import DOCKER_HUB

if TYPE_CHECKING:
    from registry.cli.client_setup import MirroredHost

HELP = "Print the configuration files with which a client pulls images through this registry."
EXAMPLES = """\b
Examples:
  entrepot client docker --url http://registry.example.com:5000
  entrepot client podman > /etc/containers/registries.conf.d/50-entrepot.conf
  entrepot client containerd --upstream docker.io > /etc/containerd/certs.d/docker.io/hosts.toml
  entrepot client buildkit --config /etc/entrepot/entrepot.toml

stdout gets the files, stderr says what to do with them. The address and the upstreams come from the settings;
if the settings name no upstream, the files are for docker.io."""


class ClientProgram(StrEnum):
    """The clients for which the command prints files; the user gives one of these values as the first argument."""

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
    """Prints the files on stdout, and on stderr hints that say what to do with them. `data` has no effect. The command
    accepts it because people use the same options as with `entrepot serve`."""
    from registry.cli import client_setup

    settings = load_or_fail(config, data=data, listen=listen, mirror=mirror).settings
    address = _parse_address(url) if url else _address_in_settings(settings)
    hosts = _select_hosts(settings, upstream or [])
    if program is ClientProgram.docker:
        _check_docker_default(settings, hosts)
    setup = client_setup.SETUPS[program.value](address, hosts)
    typer.echo("\n".join(text for _, text in setup.files), nl=False)
    for hint in setup.hints:
        typer.echo(f"# {hint}", err=True)


def _parse_address(url: str) -> RegistryAddress:
    """Parses `url`, the value of --url, by the rules of the setting `public_url`. A value without a scheme means plain
    http. Ends the command with the error text of the setting's validator if the value is not valid."""
    try:
        public_url = Settings(public_url=url if "://" in url else f"http://{url}").public_url
    except ValidationError as error:
        fail(f"--url: {error.errors()[0]['ctx']['error']}", USAGE_ERROR)
    assert public_url is not None
    return RegistryAddress(public_url)


def _address_in_settings(settings: Settings) -> RegistryAddress:
    """Returns the address that the settings give. If the address comes from `listen` and its host is a wildcard, such
    as `0.0.0.0`, the result has the host `localhost` in its place. Other machines cannot use this address, so this
    prints a hint on stderr. Ends the command if the settings leave the port to the system."""
    if not settings.public_url and settings.listen.endswith(":0"):
        fail(
            "with port 0 the server picks a free port when it starts, so the settings do not tell the port; "
            "give the server's address with --url",
            USAGE_ERROR,
        )
    if not settings.public_url and listens_everywhere(settings):
        typer.echo(
            "# this address is for clients on the same machine; for other machines give the address with --url",
            err=True,
        )
    return _parse_address(registry_address(settings).url)


def _select_hosts(settings: Settings, names: list[str]) -> list[MirroredHost]:
    """Returns the hosts that `names`, the values of --upstream, select; all hosts if `names` is empty. Ends the command
    for a name that is not mirrored.

    If the settings have no upstream, each name becomes an upstream with default settings, and an empty `names` means
    docker.io."""
    from registry.cli.client_setup import mirrored_hosts

    if not settings.upstream:
        upstreams = [_default_upstream(name) for name in dict.fromkeys(names or [DOCKER_HUB])]
        return [host for upstream in upstreams for host in mirrored_hosts(upstream)]
    all_hosts = [host for upstream in settings.upstream for host in mirrored_hosts(upstream)]
    valid_names = dict.fromkeys(name for host in all_hosts for name in (host.name, host.prefix))
    if unknown := next((name for name in names if name not in valid_names), None):
        fail(f"--upstream: {unknown} is not mirrored here; these are: {', '.join(valid_names)}", USAGE_ERROR)
    if not names:
        return all_hosts
    return [host for name in dict.fromkeys(names) for host in all_hosts if _is_selected(host, name, all_hosts)]


def _is_selected(host: MirroredHost, name: str, all_hosts: list[MirroredHost]) -> bool:
    """Returns whether `name`, a value of --upstream, selects `host`. If `name` is the prefix of a host (the host in the
    client's image names), it selects that host alone. Otherwise `name` is the name of an upstream, and selects all
    hosts of the upstream."""
    return host.prefix == name or (host.name == name and all(other.prefix != name for other in all_hosts))


def _default_upstream(name: str) -> Upstream:
    """Returns an upstream with default settings. Ends the command with the error text of the validator if the name is
    not valid."""
    try:
        return Upstream(name=name)
    except ValidationError as error:
        fail(f"--upstream: {error.errors()[0]['ctx']['error']}", USAGE_ERROR)


def _check_docker_default(settings: Settings, hosts: list[MirroredHost]) -> None:
    """Ends the command if docker would get images of another registry in place of those of Docker Hub. docker asks the
    mirror in daemon.json for `library/ubuntu`, without the host `docker.io`. So this registry asks its default
    upstream, which must be docker.io."""
    if any(host.name == DOCKER_HUB for host in hosts) and settings.upstream and settings.default_upstream != DOCKER_HUB:
        fail(
            "docker asks its mirror for names without a host, and in these settings such names do not mean docker.io; "
            "set default = true for the upstream docker.io",
            USAGE_ERROR,
        )
