"""What the commands for accounts share: access to the accounts in a data directory, passwords, and lists."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from registry.cli.interrupts import run_interruptible
from registry.cli.options import USAGE_ERROR, fail, load_or_fail, one_line_errors
from registry.cli.output import print_json, print_rows
from registry.cli.registry_address import client_address
from registry.config import Settings
from storage.access import AccountName

if TYPE_CHECKING:
    from pydantic import BaseModel

    from registry.auth.administration import Administration
    from storage.content import Actor, Page

T = TypeVar("T")
PAGE_SIZE = 1000

ForceOption = Annotated[bool, typer.Option("--force", help="Do it even if no enabled admin is left.")]
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
    create: bool = False,
) -> T:
    """Runs `work` on the accounts in the data directory and returns its result. A server may be running on it.

    `create`: creates the data directory if there is none. Ends the command with one line for an error that an operator
    can fix."""
    settings = load_or_fail(config, data=data).settings
    with one_line_errors():
        from registry.auth.administration import Administration
        from registry.auth.password.hashing import hash_password
        from registry.cli.data_owner import prepare_data_directory
        from storage.composition import open_accounts

        actor = operator_actor()
        prepare_data_directory(settings, create=create)

        async def hashed(password: str) -> str:
            return hash_password(password)

        async def act() -> T:
            async with open_accounts(settings.data) as accounts:
                return await work(Administration(accounts, hashed, clock=time.time), actor)

        return run_interruptible(act())


def print_list(
    config: Path | None,
    data: str | None,
    as_json: bool,
    *,
    read: Callable[[Administration], Iterable[T]],
    model: Callable[[T], BaseModel],
    columns: Mapping[str, Callable[[T], str]],
    empty: str,
) -> None:
    """Reads a list from the data directory and prints it: as JSON made by `model`, or as a table in which `columns`
    gives the text of each cell. `empty` is the sentence for a table without rows."""

    async def work(administration: Administration, _: Actor) -> list[T]:
        return list(read(administration))

    items = administer(config, data, work)
    if as_json:
        print_json([model(item) for item in items])
    else:
        print_rows(tuple(columns), [[cell(item) for cell in columns.values()] for item in items], empty)


def all_pages(page_after: Callable[[str | None], Page[T]], key: Callable[[T], str]) -> list[T]:
    """Reads all pages of a list. `page_after` returns the page that follows the given key."""
    items: list[T] = []
    while True:
        page = page_after(key(items[-1]) if items else None)
        items += page.items
        if not page.more:
            return items


def operator_actor() -> Actor:
    """Returns the person at the command line, as the audit log names them: `cli:` and the user name. Under sudo it is
    the user who called sudo."""
    import pwd

    from storage.content import Actor

    user = os.environ.get("SUDO_USER") if os.getuid() == 0 else None
    if not user:
        try:
            user = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            user = str(os.getuid())
    return Actor(name=f"cli:{user}")


def account_name_or_fail(text: str) -> AccountName:
    """Parses the name of an account or group. Ends the command when it is not valid."""
    with one_line_errors():
        return AccountName(text)


def password_or_fail(name: AccountName, file: Path | None, generate: bool) -> str | None:
    """Reads a password from `file` or asks for it at the terminal; returns None when one is to be generated.

    A password is never taken from the command line, where every process of the machine could read it. Ends the command
    when the password is not acceptable."""
    from registry.auth.password.hashing import check_password

    if file and generate:
        fail("--password-file and --generate contradict each other; give one of them", USAGE_ERROR)
    if generate:
        return None
    if file is not None:
        password = _first_line(file)
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


def _first_line(file: Path) -> str:
    try:
        text = sys.stdin.readline() if str(file) == "-" else file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{file}: {getattr(error, 'strerror', None) or 'it is not text'}")
    line = text.partition("\n")[0].removesuffix("\r")
    if not line:
        fail("there is no password on stdin" if str(file) == "-" else f"{file}: the first line holds no password")
    return line


def print_first_account_notice(settings: Settings, name: str, admin: bool) -> None:
    """Says what the first account changes for everyone, and which commands come next."""
    lines = [
        f"The registry at {settings.data.absolute()} is closed from now on: everyone has to log in,",
        "and can do only what an admin granted them. Running servers know this already. What to do next:",
        f"  log in          docker login {client_address(settings).host} --username {name}",
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
    typer.echo("\n".join(lines), err=True)
