"""The command `entrepot import-config`: translates the settings of a CNCF Distribution registry into settings of
Entrepot."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from registry.cli.options import fail, one_line_errors
from registry.cli.output import print_text
from registry.small_files import MAX_FILE_BYTES, decode_text, read_small_text

HELP = """Translate the config.yml of a registry:2 or registry:3 (CNCF Distribution) into a settings file in TOML.

Environment variables such as REGISTRY_HTTP_ADDR override the file, as they do for the old registry. A key without a
counterpart in Entrepot becomes a comment with the reason. Passwords are not copied. The result goes to stdout."""
EXAMPLES = (
    "\b\nExamples:\n  entrepot import-config /etc/docker/registry/config.yml > entrepot.toml\n"
    "  REGISTRY_HTTP_ADDR=:443 entrepot import-config config.yml\n  entrepot import-config - < config.yml"
)


def import_config(
    file: Annotated[
        str | None,
        typer.Argument(metavar="[FILE]", help="The config.yml, or - for stdin. [default: only variables REGISTRY_…]"),
    ] = None,
) -> None:
    """Prints the translated settings."""
    from registry.migration.config_translation import translate

    text = "" if file is None else _read_config(file)
    with one_line_errors():
        translated = translate(text, os.environ)
    print_text(translated, end="")


def _read_config(file: str) -> str:
    """Returns the text of a file, or of stdin if `file` is `-`. Ends the command if the text cannot be read."""
    try:
        if file != "-":
            return read_small_text(Path(file))
        # Reads at most one byte more than the limit, because a device can return bytes without end.
        content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            fail(f"{file} cannot be read: larger than {MAX_FILE_BYTES} bytes")
        return decode_text(content)
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        fail(f"{file} is not text in UTF-8")
