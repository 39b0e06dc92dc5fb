"""The command `entrepot import`: brings images from another registry, over the network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from registry.cli.options import USAGE_ERROR, ConfigOption, DataOption, fail
from registry.cli.upkeep.import_output import ExcludeOption, IncludeOption, OverwriteOption
from registry.cli.upkeep.import_remote import import_from_url, is_url
from registry.cli.upkeep.upkeep_run import JsonLinesOption

HELP = """Copy the images of another registry over the network, from any registry that speaks the OCI protocol.

Brings every tag with all its platforms and its signatures, into repositories of the same names. All content is checked
against its digest. What cannot be copied is listed, and the exit code is then 1. A second run brings only what changed,
and continues interrupted downloads."""
EXAMPLES = (
    "\b\nExamples:\n  entrepot import http://old.example.com:5000 --data /srv/entrepot\n"
    "  entrepot import https://registry.example.com --username ann --password-file pw --include 'team/**'"
)


def import_images(
    source: Annotated[str, typer.Argument(metavar="URL", help="The other registry: http:// or https://, host, port.")],
    username: Annotated[
        str | None, typer.Option("--username", metavar="NAME", help="User name at the other one.")
    ] = None,
    password_file: Annotated[
        Path | None, typer.Option("--password-file", metavar="FILE", help="File with the password and nothing else.")
    ] = None,
    repositories: Annotated[
        Path | None,
        typer.Option(
            "--repositories",
            metavar="FILE",
            help="File with the names of the repositories to copy, one per line, for a registry that does not list "
            "them, such as Docker Hub.",
        ),
    ] = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Accept every certificate: others on the way can change what is sent.")
    ] = False,
    ca_file: Annotated[
        Path | None, typer.Option("--ca-file", metavar="FILE", help="Certificate authorities to trust, in PEM.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", min=1, max=32, help="Copy N images at a time.")] = 4,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonLinesOption = False,
) -> None:
    """Copies the images of the registry at `source`."""
    if not is_url(source):
        fail(f"{source!r} is not the URL of a registry, such as https://registry.example.com", USAGE_ERROR)
    import_from_url(
        source,
        username=username,
        password_file=password_file,
        repositories=repositories,
        include=include,
        exclude=exclude,
        insecure=insecure,
        ca_file=ca_file,
        jobs=jobs,
        overwrite=overwrite,
        config=config,
        data=data,
        as_json=as_json,
    )
