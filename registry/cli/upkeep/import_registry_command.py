"""The command `entrepot import-registry`: imports all content from the directory of a CNCF Distribution registry
(registry:2 or registry:3)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from registry.cli.options import ConfigOption, DataOption
from registry.cli.upkeep.import_run import ExcludeOption, IncludeOption, OverwriteOption, run_import
from registry.cli.upkeep.upkeep_run import JsonLinesOption

HELP = """Import all images from the directory of a registry:2 or registry:3 (CNCF Distribution).

Imports every repository with its tags, its untagged manifests and its signatures. Files are hard-linked where that is
possible and safe, otherwise copied; each is checked against its digest. Nothing in the old directory is changed. What
is broken there is listed, and the exit code is then 1. A second run imports only what changed."""
EXAMPLES = (
    "\b\nExamples:\n  entrepot import-registry /var/lib/docker-registry --data /srv/entrepot\n"
    "  entrepot import-registry /srv/registry --include 'team/**' --exclude 'team/tmp-*'"
)


def import_registry(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="The old registry's directory: the one that contains docker/registry/v2."),
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
