"""The command `entrepot mirror test`: measures how fast the endpoints of the upstreams are. An *upstream* is a mirrored
registry, and its *endpoints* are the URLs at which it can be reached."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry.cli.options import USAGE_ERROR, ConfigOption, DataOption, JsonOption, MirrorOption, fail
from registry.cli.output import print_json_value, print_line, print_text

if TYPE_CHECKING:
    from registry.cli.diagnosis.endpoint_speed import EndpointSpeed
    from registry.config import Settings, Upstream
    from storage.names import RepositoryName, Tag

HELP = (
    "Measure the endpoints of an upstream: the time for a connection, TLS, the first byte and a manifest, and how fast "
    "up to 8 MiB of a layer arrive. Say which endpoint is the fastest, and what to write in the settings. The exit "
    "code is 1 if no endpoint of an upstream works."
)
EXAMPLES = """\b
Examples:
  entrepot mirror test -c entrepot.toml
  entrepot mirror test docker.io --mirror docker.io
  entrepot mirror test docker.io --endpoint https://mirror.gcr.io --endpoint https://registry-1.docker.io
  entrepot mirror test registry.corp -c entrepot.toml --image team/app:1

The manifests that are fetched count against the upstream's rate limit: two for each endpoint."""


def measure(
    upstream: Annotated[
        str | None, typer.Argument(metavar="[UPSTREAM]", help="The upstream to measure. [default: all]")
    ] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            "--endpoint", metavar="URL", help="Measure this URL in place of those in the settings. Repeat for more."
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            "--image", metavar="NAME:TAG", help="The image to fetch, as the upstream names it. [default: a small one]"
        ),
    ] = None,
    config: ConfigOption = None,
    data: DataOption = None,
    mirror: MirrorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measures one endpoint after the other, so that they do not share the bandwidth, and prints the result. Accepts
    `data` like the other commands, but does not use the data directory."""
    from registry.cli.diagnosis.endpoint_speed import advice
    from registry.cli.interrupts import run_interruptible

    settings = _settings(config, data, mirror)
    upstreams = _select(settings, upstream, endpoint or [])
    if image is not None and len(upstreams) > 1:
        fail("--image needs the name of one upstream", USAGE_ERROR)
    results, exit_code = [], 0
    for chosen in upstreams:
        speeds = run_interruptible(_measure(chosen, image))
        sentence, snippet = advice(chosen, speeds)
        if all(speed.error is not None for speed in speeds):
            exit_code = 1
        if as_json:
            values = [_as_json(speed) for speed in speeds]
            results.append({"upstream": chosen.name, "endpoints": values, "advice": sentence, "lines": snippet or None})
        else:
            _print(chosen, speeds, sentence, snippet)
    if as_json:
        print_json_value(results, indent=2)
    raise typer.Exit(exit_code)


def _settings(config: Path | None, data: str | None, mirror: list[str] | None) -> Settings:
    from registry.cli.mirror.mirror_command import load_mirror_settings

    return load_mirror_settings(config, data, mirror)


def _select(settings: Settings, name: str | None, endpoints: list[str]) -> list[Upstream]:
    """Returns the settings of the upstream `name`, or of all upstreams if `name` is None. If `endpoints` is not empty,
    it replaces the endpoints of the upstream. Ends the command if `name` is not an upstream in the settings, if an
    endpoint is not a URL, or if `endpoints` are given for several upstreams."""
    from pydantic import ValidationError

    from registry.config import Upstream

    names = [upstream.name for upstream in settings.upstream]
    if name is not None and name not in names:
        fail(f"{name} is not mirrored here; these are: {', '.join(names)}", USAGE_ERROR)
    chosen = [upstream for upstream in settings.upstream if name in (None, upstream.name)]
    if not endpoints:
        return chosen
    if len(chosen) > 1:
        fail("--endpoint needs the name of one upstream", USAGE_ERROR)
    try:
        urls = Upstream(name=chosen[0].name, endpoints=endpoints).endpoints
    except ValidationError as error:
        fail(f"--endpoint: {error.errors()[0]['ctx']['error']}", USAGE_ERROR)
    return [chosen[0].model_copy(update={"endpoints": urls})]


async def _measure(upstream: Upstream, image: str | None) -> list[EndpointSpeed]:
    from registry.cli.diagnosis.endpoint_speed import measure_endpoint

    reference = _image(upstream, image)
    return [await measure_endpoint(upstream, url, reference) for url in dict.fromkeys(upstream.endpoints)]


def _image(upstream: Upstream, image: str | None) -> tuple[RepositoryName, Tag] | None:
    """Returns the image to fetch. `image`: the value of --image; None: the upstream's default image is fetched. If the
    upstream has no default image, prints a hint and returns None, so that only the connections are measured. Ends the
    command if --image is not valid."""
    from registry.cli.diagnosis.endpoint_speed import DEFAULT_IMAGES
    from storage.errors import RegistryError
    from storage.names import RepositoryName, Tag

    text = image or DEFAULT_IMAGES.get(upstream.name)
    if text is None:
        hint = f"entrepot: to measure how fast {upstream.name} sends, name one of its images with --image NAME:TAG"
        print_line(hint, err=True)
        return None
    name, _, tag = text.removeprefix(f"{upstream.name}/").rpartition(":")
    # If the text has no colon, `name` is empty, and `tag` contains the name of the repository.
    try:
        return RepositoryName(name or tag), Tag(tag if name else "latest")
    except RegistryError as error:
        fail(f"--image: {error.message}", USAGE_ERROR)


def _as_json(speed: EndpointSpeed) -> dict[str, Any]:
    return {
        "url": speed.url,
        "connect": speed.connect_seconds,
        "tls": speed.tls_seconds,
        "first_byte": speed.first_byte_seconds,
        "manifest": speed.manifest_seconds,
        "bytes": speed.blob_bytes,
        "bytes_per_second": speed.bytes_per_second,
        "proxy": speed.proxy is not None,
        "error": speed.error,
    }


def _print(upstream: Upstream, speeds: list[EndpointSpeed], sentence: str, snippet: str) -> None:
    import textwrap

    from rich.text import Text

    from registry.cli.diagnosis.endpoint_speed import rank
    from registry.cli.output import human_size, new_table, plain_console

    table = new_table(upstream.name, "connect", "TLS", "first byte", "manifest", "speed", "error")
    for speed in rank(speeds):
        rate = speed.bytes_per_second
        times = (speed.connect_seconds, speed.tls_seconds, speed.first_byte_seconds, speed.manifest_seconds)
        cells = [speed.url, *map(_milliseconds, times)]
        cells += ["-" if rate is None else f"{human_size(int(rate))}/s", speed.error or "-"]
        table.add_row(*map(Text, cells))
    plain_console().print(table)
    for note in dict.fromkeys(note for speed in speeds for note in speed.notes):
        print_line(note)
    print_text(f"\n{sentence}")
    if snippet:
        print_text(textwrap.indent(snippet, "    "), end="")


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"
