"""The command `entrepot client PROGRAM` prints configuration files with which a client, such as docker, pulls through
this registry. The command `entrepot client check PROGRAM` checks whether the configuration of a client on this machine
makes it pull through this registry.

An *upstream* is a remote registry that this registry mirrors, such as `docker.io`.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from registry.cli.options import (
    USAGE_ERROR,
    ConfigOption,
    DataOption,
    JsonOption,
    ListenOption,
    MirrorOption,
    fail,
    load_or_fail,
)
from registry.cli.output import print_line, print_text
from registry.clients.registry_address import RegistryAddress, listens_everywhere, registry_address
from registry.config import Settings, Upstream
from registry.config.mirror_settings import DOCKER_HUB

if TYPE_CHECKING:
    from registry.clients.client_setup import MirroredHost

HELP = "Print the configuration files with which a client pulls images through this registry, or check them."
EXAMPLES = """\b
Examples:
  {0}

stdout gets the files, stderr says what to do with them. The address and the upstreams come from the settings;
if the settings name no upstream, the files are for docker.io."""
PROGRAMS = {
    "docker": ("docker's daemon.json", "entrepot client docker --url http://registry.example.com:5000"),
    "containerd": (
        "containerd's hosts.toml",
        "entrepot client containerd --upstream docker.io > /etc/containerd/certs.d/docker.io/hosts.toml",
    ),
    "podman": (
        "the registries.conf of podman, buildah, skopeo and CRI-O",
        "entrepot client podman > /etc/containers/registries.conf.d/50-entrepot.conf",
    ),
    "buildkit": ("buildkitd.toml", "entrepot client buildkit --config /etc/entrepot/entrepot.toml"),
}
"""By client: a description of the files that the command prints for it, and an example of the command."""
CHECK_HELP = (
    "Read the configuration of a client on this machine, and say whether the client pulls through this registry. If "
    "the client does not, say why and which lines to write into which file, and exit with code 1."
)
CHECK_EXAMPLES = """\b
Examples:
  entrepot client check docker --url http://registry.example.com:5000
  entrepot client check containerd --url https://registry.example.com --upstream docker.io --upstream ghcr.io
  entrepot client check podman --root /mnt/node1 --offline"""
app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        "-u",
        metavar="URL",
        help="This registry's address as the client reaches it. [default: public_url, else listen]",
    ),
]
UpstreamOption = Annotated[
    list[str] | None,
    typer.Option("--upstream", metavar="NAME", help="Only this upstream. Repeat for more. [default: all]"),
]


class CheckedProgram(StrEnum):
    """The clients whose configuration `entrepot client check` can check: the values of its argument."""

    docker = "docker"
    containerd = "containerd"
    podman = "podman"


def _add_program(name: str, files_description: str, example: str) -> None:
    """Adds the command that prints the files of one client."""

    @app.command(name, help=f"Print {files_description}.", epilog=EXAMPLES.format(example))
    def print_files(
        url: UrlOption = None,
        upstream: UpstreamOption = None,
        config: ConfigOption = None,
        data: DataOption = None,
        listen: ListenOption = None,
        mirror: MirrorOption = None,
    ) -> None:
        """Prints the files on stdout, and hints about their use on stderr. `data` has no effect; the command accepts
        it because `entrepot serve` does."""
        from registry.clients import client_setup

        settings = load_or_fail(config, data=data, listen=listen, mirror=mirror).settings
        address, hosts = select_target(settings, url, upstream)
        if name == "docker":
            _check_docker_default(settings, hosts)
        setup = client_setup.SETUPS[name](address, hosts)
        print_text("\n".join(text for _, text in setup.files), end="")
        for hint in setup.hints:
            print_line(f"# {hint}", err=True)
        if name == "containerd" and len(setup.files) > 1:
            only_one = "--upstream NAME prints only the file of that upstream"
            print_line(f"# this output contains {len(setup.files)} files; {only_one}", err=True)


for _name, (_files_description, _example) in PROGRAMS.items():
    _add_program(_name, _files_description, _example)


@app.command("check", help=CHECK_HELP, epilog=CHECK_EXAMPLES)
def check(
    program: Annotated[CheckedProgram, typer.Argument(help="The client to check.", show_default=False)],
    url: UrlOption = None,
    upstream: UpstreamOption = None,
    root: Annotated[
        Path | None,
        typer.Option("--root", metavar="DIR", help="Read the files below this directory. [default: /]"),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not connect to the registry.")] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    listen: ListenOption = None,
    mirror: MirrorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prints the findings. The exit code is 1 if the client does not pull through this registry. `data` has no
    effect."""
    from registry.cli.diagnosis.client_check import check_client
    from registry.cli.diagnosis.finding_output import print_findings

    settings = load_or_fail(config, data=data, listen=listen, mirror=mirror).settings
    address, hosts = select_target(settings, url, upstream)
    default_upstream = settings.default_upstream if settings.upstream else DOCKER_HUB
    findings = check_client(program.value, address, hosts, default_upstream, root=root, offline=offline)
    raise typer.Exit(print_findings(findings, as_json=as_json))


def select_target(
    settings: Settings, url: str | None, upstream_names: list[str] | None
) -> tuple[RegistryAddress, list[MirroredHost]]:
    """Returns the registry's address and the hosts whose images clients pull through it. `url` and `upstream_names`:
    the values of --url and --upstream. Ends the command if one of these values is not valid."""
    address = _parse_address(url) if url else _address_in_settings(settings)
    return address, _select_hosts(settings, upstream_names or [])


def _parse_address(url: str) -> RegistryAddress:
    """Parses a URL by the rules of the setting `public_url`. A URL without a scheme gets the scheme `http`. Ends the
    command with an error about --url if the URL is not valid."""
    try:
        public_url = Settings(public_url=url if "://" in url else f"http://{url}").public_url
    except ValidationError as error:
        fail(f"--url: {error.errors()[0]['ctx']['error']}", USAGE_ERROR)
    assert public_url is not None
    return RegistryAddress(public_url)


def _address_in_settings(settings: Settings) -> RegistryAddress:
    """Returns the address in the setting `public_url`. If `public_url` is not set, returns the address in `listen`:

    - For a wildcard host, such as `0.0.0.0`, the result has the host `localhost`, which only this machine can use. A
      hint on stderr says this.
    - For port 0, ends the command with an error."""
    if not settings.public_url and settings.listen.endswith(":0"):
        fail(
            "with port 0 the server picks a free port when it starts, so the settings do not tell the port; "
            "give the server's address with --url",
            USAGE_ERROR,
        )
    if not settings.public_url and listens_everywhere(settings):
        print_line(
            "# this address is for clients on the same machine; for other machines give the address with --url",
            err=True,
        )
    return _parse_address(registry_address(settings).url)


def _select_hosts(settings: Settings, names: list[str]) -> list[MirroredHost]:
    """Returns the hosts for which files are printed or checked. `names`: the values of --upstream.

    - If the settings have upstreams: returns the hosts that `names` select (`_is_selected`), or all hosts if `names` is
      empty. Ends the command with an error if a name selects no host.
    - If the settings have no upstream: returns the hosts of an upstream with default settings for each name, or for
      docker.io if `names` is empty."""
    from registry.clients.client_setup import mirrored_hosts

    if not settings.upstream:
        upstreams = [_upstream_with_defaults(name) for name in dict.fromkeys(names or [DOCKER_HUB])]
        return [host for upstream in upstreams for host in mirrored_hosts(upstream)]
    all_hosts = [host for upstream in settings.upstream for host in mirrored_hosts(upstream)]
    valid_names = dict.fromkeys(name for host in all_hosts for name in (host.upstream, host.prefix))
    if unknown := next((name for name in names if name not in valid_names), None):
        fail(f"--upstream: {unknown} is not mirrored here; valid values are: {', '.join(valid_names)}", USAGE_ERROR)
    if not names:
        return all_hosts
    return [host for name in dict.fromkeys(names) for host in all_hosts if _is_selected(host, name, all_hosts)]


def _is_selected(host: MirroredHost, name: str, all_hosts: list[MirroredHost]) -> bool:
    """Returns whether `name`, a value of --upstream, selects `host`. The prefix of a host is the host
    name at the beginning of the image names that a client uses, such as `docker.io` in `docker.io/library/ubuntu`.

    - If `name` is the prefix of any host, it selects only the host with this prefix.
    - Otherwise, `name` is the name of an upstream, and selects all hosts of the upstream. An upstream with aliases has
      several hosts."""
    return host.prefix == name or (host.upstream == name and all(other.prefix != name for other in all_hosts))


def _upstream_with_defaults(name: str) -> Upstream:
    """Returns an upstream with default settings. Ends the command with an error about --upstream if the name is not
    valid."""
    try:
        return Upstream(name=name)
    except ValidationError as error:
        fail(f"--upstream: {error.errors()[0]['ctx']['error']}", USAGE_ERROR)


def _check_docker_default(settings: Settings, hosts: list[MirroredHost]) -> None:
    """Ends the command with an error if docker would get images of another registry in place of images of Docker Hub.
    docker asks its mirror for `library/ubuntu`, without the host `docker.io`. This registry fetches names without a
    host from its default upstream, so the default upstream must be docker.io."""
    has_docker_hub = any(host.upstream == DOCKER_HUB for host in hosts)
    if has_docker_hub and settings.upstream and settings.default_upstream != DOCKER_HUB:
        fail(
            "docker asks its mirror for names without a host, such as library/ubuntu, and with these settings this "
            "registry does not fetch them from docker.io; set `default = true` for the upstream docker.io",
            USAGE_ERROR,
        )
