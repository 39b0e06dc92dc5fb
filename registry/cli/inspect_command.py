"""`entrepot inspect`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.interrupts import run_interruptible
from registry.cli.options import ConfigOption, DataOption, fail, load_or_fail, one_line_errors

if TYPE_CHECKING:
    from storage.names import ImageReference

HELP = "Show what a tag or digest in the data directory is. The registry may be running."
EXAMPLES = """\b
Examples:
  entrepot inspect team/app
  entrepot inspect localhost:5000/team/app:1.2 --json
  entrepot inspect team/app@sha256:0a1b…

No tag means `latest`."""


def inspect(
    reference: Annotated[str, typer.Argument(metavar="REF", help="NAME, NAME:TAG or NAME@DIGEST.")],
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    settings = load_or_fail(config, data=data).settings
    with one_line_errors():
        from registry.cli.data_owner import become_owner
        from registry.cli.image_summary import summarize_image
        from storage.composition import check_version, open_registry

        where = parse_image_reference(reference)
        if not settings.data.is_dir():
            fail(f"there is no data directory at {settings.data.absolute()}; name it with --data")
        become_owner(settings.data)
        check_version(settings.data)

        async def look() -> dict[str, object]:
            async with open_registry(settings.data) as registry:
                return await summarize_image(registry, where)

        seen = run_interruptible(look())
    if as_json:
        typer.echo(json.dumps(seen, indent=2, ensure_ascii=False))
    else:
        from registry.cli.output import print_image_summary

        print_image_summary(seen)


def parse_image_reference(text: str) -> ImageReference:
    """What people paste, read as a place in this registry: a leading host, and `http://` before it, go. Raises
    NameInvalid, TagInvalid, DigestInvalid."""
    from storage.names import parse_reference

    text = text.strip().removeprefix("http://").removeprefix("https://")
    host, slash, rest = text.partition("/")
    if slash and (":" in host or host == "localhost"):
        text = rest
    return parse_reference(text)
