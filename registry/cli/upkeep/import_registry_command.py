"""The command `entrepot import-registry`: imports images from the directory of a CNCF Distribution registry (registry:2
or registry:3)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from registry.cli.options import ConfigOption, DataOption
from registry.cli.upkeep.import_run import ExcludeOption, IncludeOption, OverwriteOption, run_import
from registry.cli.upkeep.upkeep_run import JsonLinesOption

HELP = """Import all images from the directory of a CNCF Distribution registry (registry:2 or registry:3).

Imports every repository with its tags, its untagged manifests and its signatures. Hard-links each file if this is
possible and safe, and otherwise copies the file. Checks each file against its digest. Changes nothing in the old
directory. Lists content that cannot be imported, and ends with exit code 1 if there is such content. A second run
imports only what has changed since the first run."""
EXAMPLES = (
    "\b\nExamples:\n  entrepot import-registry /var/lib/docker-registry --data /srv/entrepot\n"
    "  entrepot import-registry /srv/registry --include 'team/**' --exclude 'team/tmp-*'"
)


def import_registry(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="The old registry's directory, which contains docker/registry/v2."),
    ],
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy all files; make no hard links.")] = False,
    overwrite: OverwriteOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonLinesOption = False,
) -> None:
    """Imports the registry whose directory is `path`."""
    arguments = {
        "path": str(path.absolute()),
        "include": include or [],
        "exclude": exclude or [],
        "copy": copy,
        "overwrite": overwrite,
    }
    run_import(config, data, "import-registry", arguments, as_json=as_json)
