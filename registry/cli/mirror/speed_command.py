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
    "Measure the endpoints of an upstream: the times for the connection, TLS, the first byte and a manifest, and the "
    "download speed of up to 8 MiB of a layer. Say which endpoint is the fastest, and what to write in the settings. "
    "The exit code is 1 if any measured upstream has no endpoint that works."
)
EXAMPLES = """\b
Examples:
  entrepot mirror test -c entrepot.toml
  entrepot mirror test docker.io --mirror docker.io
  entrepot mirror test docker.io --endpoint https://mirror.gcr.io --endpoint https://registry-1.docker.io
  entrepot mirror test registry.corp -c entrepot.toml --image team/app:1

For each endpoint, the command fetches up to two manifests, which count against the upstream's rate limit."""


def measure(
    upstream: Annotated[
        str | None, typer.Argument(metavar="[UPSTREAM]", help="The upstream to measure. [default: all upstreams]")
    ] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option("--endpoint", metavar="URL", help="Measure this URL, not those in the settings. May be repeated."),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option("--image", metavar="NAME:TAG", help="An image of the upstream to fetch. [default: a small image]"),
    ] = None,
    config: ConfigOption = None,
    data: DataOption = None,
    mirror: MirrorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measures the endpoints one after the other, so that they do not share the bandwidth. Prints the results. Accepts
    `data` like the other commands, but does not use the data directory."""
    from registry.cli.diagnosis.endpoint_speed import advice
    from registry.cli.interrupts import run_interruptible

    settings = _load_settings(config, data, mirror)
    upstreams = _select_upstreams(settings, upstream, endpoint or [])
    if image is not None and len(upstreams) > 1:
        fail("--image needs the name of one upstream", USAGE_ERROR)
    results, exit_code = [], 0
    for chosen in upstreams:
        speeds = run_interruptible(_measure(chosen, image))
        advice_text, settings_lines = advice(chosen, speeds)
        if all(speed.error is not None for speed in speeds):
            exit_code = 1
        if as_json:
            values = [_as_json(speed) for speed in speeds]
            results.append(
                {"upstream": chosen.name, "endpoints": values, "advice": advice_text, "lines": settings_lines or None}
            )
        else:
            _print_speeds(chosen, speeds, advice_text, settings_lines)
    if as_json:
        print_json_value(results, indent=2)
    raise typer.Exit(exit_code)


def _load_settings(config: Path | None, data: str | None, mirror: list[str] | None) -> Settings:
    from registry.cli.mirror.mirror_command import load_mirror_settings

    return load_mirror_settings(config, data, mirror)


def _select_upstreams(settings: Settings, name: str | None, endpoints: list[str]) -> list[Upstream]:
    """Returns the settings of the upstream `name`. If `name` is None, returns the settings of all upstreams. If
    `endpoints` is not empty, these URLs replace the endpoints in the settings. Ends the command in these cases:

    - `name` is not an upstream in the settings.
    - An endpoint is not a valid URL.
    - `endpoints` is not empty, and several upstreams are selected."""
    from pydantic import ValidationError

    from registry.config import Upstream

    names = [upstream.name for upstream in settings.upstream]
    if name is not None and name not in names:
        fail(f"{name} is not mirrored here; the mirrored registries are: {', '.join(names)}", USAGE_ERROR)
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

    reference = _image_to_fetch(upstream, image)
    return [await measure_endpoint(upstream, url, reference) for url in dict.fromkeys(upstream.endpoints)]


def _image_to_fetch(upstream: Upstream, image: str | None) -> tuple[RepositoryName, Tag] | None:
    """Returns the image to fetch: `image` (the value of --image), or the upstream's default image if `image` is None.
    If `image` is None and the upstream has no default image, prints a hint and returns None. Ends the command if
    --image is not valid."""
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


def _print_speeds(upstream: Upstream, speeds: list[EndpointSpeed], advice_text: str, settings_lines: str) -> None:
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
    print_text(f"\n{advice_text}")
    if settings_lines:
        print_text(textwrap.indent(settings_lines, "    "), end="")


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"
