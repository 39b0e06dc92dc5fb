"""The command `entrepot import`: imports images from a file, a directory or another registry into hosted repositories.
A repository is hosted if clients push to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from registry.cli.options import USAGE_ERROR, ConfigOption, DataOption, fail
from registry.cli.upkeep.import_file import import_file
from registry.cli.upkeep.import_remote import import_from_url, is_url
from registry.cli.upkeep.import_run import ExcludeOption, IncludeOption, OverwriteOption
from registry.cli.upkeep.upkeep_run import JsonLinesOption

HELP = """Copy images into this registry from a file, a directory or another registry.

A file or directory is an OCI image layout, or an archive of docker save. From a registry, the command copies every tag
with all its platforms and its signatures, into repositories of the same names. It checks all content against its
digest. If something cannot be copied, the command says what, and exits with code 1. A second run copies only what is
missing, and continues interrupted downloads."""
EXAMPLES = """\b
Examples:
  docker save team/app:1 -o app.tar && entrepot import app.tar
  entrepot import app.tar.gz --as team/app:1
  entrepot import images/ --as team/app                # each image keeps its tag
  entrepot import http://old.example.com:5000 --data /srv/entrepot
  entrepot import https://registry.example.com --username ann --password-file pw --include 'team/**'"""


def import_images(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE|DIR|URL",
            help="A tar archive, maybe compressed; a directory; or the URL of a registry, http:// or https://.",
        ),
    ],
    as_name: Annotated[
        str | None,
        typer.Option(
            "--as", metavar="NAME[:TAG]", help="Name for the images of a file or directory. [default: the names in it]"
        ),
    ] = None,
    username: Annotated[
        str | None, typer.Option("--username", metavar="NAME", help="User name at the other registry.")
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
        bool,
        typer.Option("--insecure", help="Do not check certificates. Others can then read and change what is sent."),
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
    """Imports the images of `source`."""
    if not is_url(source):
        for option, value in {
            "--username": username,
            "--password-file": password_file,
            "--repositories": repositories,
            "--include": include,
            "--exclude": exclude,
            "--insecure": insecure,
            "--ca-file": ca_file,
            "--overwrite": overwrite,
        }.items():
            if value:
                fail(
                    f"{option} is only for imports from another registry, but {source} is a file or directory",
                    USAGE_ERROR,
                )
        import_file(Path(source), as_name, config, data, as_json=as_json)
        return
    if as_name is not None:
        fail("--as is for a file or directory; images of another registry keep their names", USAGE_ERROR)
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
