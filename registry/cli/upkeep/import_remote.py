"""`entrepot import` with a URL: copies the content of another registry over the network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from registry.cli.options import USAGE_ERROR, fail
from registry.cli.upkeep.import_run import run_import
from registry.small_files import read_small_text

_PASSWORD_VARIABLE: Final = "_ENTREPOT_IMPORT_PASSWORD"  # begins with `_`, because ENTREPOT_* are settings
"""The environment variable of this process that passes the password to the HTTP client. This process reads the password
file first, and then becomes the user who owns the data directory, who may not be allowed to read the password file."""


def is_url(source: str) -> bool:
    """Returns whether `source`, the argument of `entrepot import`, is the URL of a registry and not a file."""
    return source.startswith(("http://", "https://"))


def import_from_url(
    url: str,
    *,
    username: str | None,
    password_file: Path | None,
    repositories: Path | None,
    include: list[str] | None,
    exclude: list[str] | None,
    insecure: bool,
    ca_file: Path | None,
    jobs: int,
    overwrite: bool,
    config: Path | None,
    data: str | None,
    as_json: bool,
) -> None:
    """Runs the import. Ends the command with exit code 1 if something could not be imported."""
    if (username is None) != (password_file is None):
        fail("--username and --password-file belong together; give both or none", USAGE_ERROR)
    if password_file is not None:
        os.environ[_PASSWORD_VARIABLE] = _read_or_fail(password_file, "password").rstrip("\r\n")
    names = None
    if repositories is not None:
        lines = (line.strip() for line in _read_or_fail(repositories, "list of repositories").splitlines())
        names = [line for line in lines if line and not line.startswith("#")]
    arguments = {
        "url": url,
        "username": username,
        "password_env": None if password_file is None else _PASSWORD_VARIABLE,
        "repositories": names,
        "include": include or [],
        "exclude": exclude or [],
        "insecure": insecure,
        "ca_file": None if ca_file is None else str(ca_file.absolute()),
        "jobs": jobs,
        "overwrite": overwrite,
    }
    run_import(config, data, "import-remote", arguments, as_json=as_json)


def _read_or_fail(file: Path, what: str) -> str:
    """Returns the text of a file. Ends the command if the file cannot be read. `what`: the content of the file, for the
    message."""
    try:
        return read_small_text(file)
    except OSError as error:
        fail(f"the {what} in {file} cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        fail(f"{file} is not text in UTF-8")
