"""Functions and options that the account commands share: access to the accounts in a data directory, output of lists,
and input of passwords.

`Administration` reads and changes the accounts, groups, grants and tokens of a data directory. The *actor* is the
person whom the audit log names for a change. Each method of `Administration` that changes something takes the actor as
the argument `by`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from registry.cli.interrupts import run_interruptible
from registry.cli.options import USAGE_ERROR, fail, load_or_fail, one_line_errors
from registry.cli.output import print_json, print_line, print_rows, print_text
from registry.clients.registry_address import registry_address
from registry.config import Settings
from registry.small_files import MAX_FILE_BYTES, read_small_text
from storage.access import AccountName

if TYPE_CHECKING:
    from pydantic import BaseModel

    from registry.auth.administration import Administration
    from storage.content import Actor, Page

T = TypeVar("T")
PAGE_SIZE = 1000
"""Number of entries in each page that is read from the store."""

ForceOption = Annotated[
    bool, typer.Option("--force", help="Make the change even if no enabled admin is left after it.")
]
NoteOption = Annotated[str, typer.Option("--note", metavar="TEXT", help="A remark for people, in one line.")]
PasswordFileOption = Annotated[
    Path | None,
    typer.Option(
        "--password-file", metavar="FILE", help="Read the password from the first line of FILE; - means stdin."
    ),
]
GenerateOption = Annotated[
    bool, typer.Option("--generate", help="Generate a password and print it. It is not shown again.")
]


def administer(
    config: Path | None,
    data: str | None,
    work: Callable[[Administration, Actor], Awaitable[T]],
    *,
    create_data_directory: bool = False,
) -> T:
    """Opens the accounts in the data directory, and returns the result of `work`. The arguments of `work` are the
    `Administration` of these accounts and the actor of this command. A server may use the data directory at the same
    time. If root runs the command, the process first becomes the user who owns the data directory, and remains that
    user (`prepare_data_directory`). Ends the command with one line on stderr for an error that an operator can fix.

    `config` and `data`: the values of --config and --data. `create_data_directory`: whether to create a missing data
    directory."""
    settings = load_or_fail(config, data=data).settings
    with one_line_errors():
        from registry.auth.administration import Administration
        from registry.auth.password.hashing import hash_password
        from registry.auth.password.htpasswd import HtpasswdFile
        from registry.cli.data_owner import operator_actor, prepare_data_directory
        from storage.composition import open_accounts

        prepare_data_directory(settings, create_if_missing=create_data_directory)

        async def hash_in_event_loop(password: str) -> str:
            return hash_password(password)  # may block the event loop, because nothing else runs in it

        htpasswd = HtpasswdFile(settings.auth.htpasswd) if settings.auth.htpasswd else None

        async def run_work() -> T:
            async with open_accounts(settings.data) as accounts:
                administration = Administration(accounts, hash_in_event_loop, clock=time.time, htpasswd=htpasswd)
                return await work(administration, operator_actor())

        return run_interruptible(run_work())


def print_hints(hints: Iterable[str]) -> None:
    """Prints hints about a new account (`NewAccount.hints`) on stderr."""
    for hint in hints:
        print_line(f"note: {hint}", err=True)


def has_had_account(settings: Settings) -> bool:
    """Returns whether the data directory has, or ever had, an account. Returns False if the directory has no data. Can
    also read data of an older version, which is not migrated yet. If root runs the command, the process first becomes
    the user who owns the data directory, and remains that user (`become_owner`). Ends the command with one line on
    stderr if the process cannot become that user, or if the data cannot be read."""
    from registry.cli.data_owner import become_owner
    from storage import composition

    with one_line_errors():
        become_owner(settings.data)
        return composition.has_data(settings.data) and composition.has_had_account(settings.data)


def print_list(
    config: Path | None,
    data: str | None,
    as_json: bool,
    *,
    read: Callable[[Administration], Iterable[T]],
    to_model: Callable[[T], BaseModel],
    columns: Mapping[str, Callable[[T], str]],
    empty_message: str,
) -> None:
    """Reads a list from the data directory and prints it as a table, or as JSON.

    - `config`, `data` and `as_json` are the values of the options --config, --data and --json.
    - `read` returns the items.
    - `to_model` converts an item for the JSON output.
    - `columns` maps each column's title to a function that returns the text of an item's cell.
    - `empty_message` is printed on stderr in place of a table without rows."""

    async def work(administration: Administration, _: Actor) -> list[T]:
        return list(read(administration))

    items = administer(config, data, work)
    if as_json:
        print_json([to_model(item) for item in items])
    else:
        rows = [[cell_text(item) for cell_text in columns.values()] for item in items]
        print_rows(tuple(columns), rows, empty_message)


def read_all_pages(read_page: Callable[[str | None], Page[T]], sort_key: Callable[[T], str]) -> list[T]:
    """Reads all pages of a list and returns the items. `read_page` takes the sort key of an item and returns the page
    that follows this item; for None, it returns the first page."""
    items: list[T] = []
    while True:
        page = read_page(sort_key(items[-1]) if items else None)
        items += page.items
        if not page.more:
            return items


def parse_name_or_fail(text: str) -> AccountName:
    """Returns `text` as the name of an account or group. Ends the command if the name is not valid."""
    with one_line_errors():
        return AccountName(text)


def read_password_file(file: Path | None) -> str | None:
    """Returns the text of a password file, for the argument `file_text` of `password_or_fail`. Returns None if `file`
    is None or `-` (stdin), or if the file cannot be read. If the command needs the password, `password_or_fail` then
    reads the file again, and reports the error.

    Call this before `has_had_account`, which can switch the process to a user who may not read the file."""
    if file is None or str(file) == "-":
        return None
    try:
        return read_small_text(file)
    except (OSError, UnicodeDecodeError):
        return None


def password_or_fail(name: AccountName, file: Path | None, generate: bool, file_text: str | None = None) -> str | None:
    """Returns the password for the account `name`. If `generate` is true, returns None, and the registry generates a
    password. Otherwise, reads the password from `file`, or from the terminal if `file` is None. `file_text`: the text
    of `file`; None if the file was not read yet. Ends the command if there is no password, or if the password is not
    acceptable.

    The password cannot be an argument of the command, because every process of the machine can read the arguments."""
    from registry.auth.password.hashing import check_password

    if file and generate:
        fail("--password-file and --generate contradict each other; give one of them", USAGE_ERROR)
    if generate:
        return None
    if file is not None:
        password = _first_line(file, file_text)
    elif sys.stdin.isatty():
        password = typer.prompt(f"Password for {name}", hide_input=True, confirmation_prompt="The same again", err=True)
    else:
        fail(
            "there is no terminal to ask for a password: give --password-file FILE (- is stdin) or --generate",
            USAGE_ERROR,
        )
    with one_line_errors():
        check_password(password)
    return password


def _first_line(file: Path, text: str | None) -> str:
    """Returns the first line of the file, without the line end. The file `-` means stdin. `text`: the text of the file;
    if None, reads the file. Ends the command if the file cannot be read, or if the line is empty."""
    try:
        if text is None:
            text = sys.stdin.readline(MAX_FILE_BYTES) if str(file) == "-" else read_small_text(file)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{file}: {getattr(error, 'strerror', None) or 'it is not text'}")
    line = text.partition("\n")[0].removesuffix("\r")
    if not line:
        fail("there is no password on stdin" if str(file) == "-" else f"{file}: there is no password in the first line")
    return line


def print_first_account_notice(settings: Settings, name: str, admin: bool) -> None:
    """Prints on stderr that from now on everyone has to log in, and which commands to run next. `name`: the name of the
    first account, which was just added. `admin`: whether this account is an admin."""
    lines = [
        f"The registry at {settings.data.absolute()} is closed from now on: everyone has to log in,",
        "and can do only what an admin granted them. Running servers know this already. What to do next:",
        f"  log in          docker login {registry_address(settings).host} --username {name}",
    ]
    if not admin:
        lines.append("  an admin        entrepot user add NAME --admin   (there is none yet)")
    lines += [
        "  a team          entrepot group add dev; entrepot group join dev NAME",
        "                  entrepot grant add 'team/**' pull,push group:dev",
        "  pull for all    entrepot grant add '**' pull everyone",
        "  a CI job        entrepot robot add ci; entrepot grant add 'team/**' pull,push robot:ci",
        "                  entrepot token add ci",
    ]
    print_text("\n".join(lines), err=True)
