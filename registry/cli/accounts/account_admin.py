"""What the commands about accounts share: the data directory opened beside a running server, who acts, passwords."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from registry.cli.interrupts import run_interruptible
from registry.cli.options import USAGE_ERROR, fail, load_or_fail, one_line_errors
from registry.config import Settings

if TYPE_CHECKING:
    from pydantic import BaseModel

    from registry.auth.administration import Administration
    from storage.access import AccountName
    from storage.content import Actor, Page

T = TypeVar("T")
PAGE_SIZE = 1000

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Even if no admin is left who is enabled.")]
NoteOption = Annotated[str, typer.Option("--note", metavar="TEXT", help="One line for people.")]
PasswordFileOption = Annotated[
    Path | None,
    typer.Option("--password-file", metavar="FILE", help="Holds the password in its first line; - is stdin."),
]
GenerateOption = Annotated[bool, typer.Option("--generate", help="Make a password and print it, this once.")]


def administer(
    config: Path | None,
    data: str | None,
    work: Callable[[Administration, Actor], Awaitable[T]],
    *,
    make: bool = False,
) -> T:
    """What `work` gives, done on the accounts in the data directory; the registry may be running. `make`: a directory
    that is not there yet is made. Ends the command with one line for what an operator can do something about."""
    settings = load_or_fail(config, data=data).settings
    with one_line_errors():
        from registry.auth.administration import Administration
        from registry.auth.password.hashing import hash_password
        from registry.cli.data_owner import prepare_data_directory
        from storage.composition import open_accounts

        actor = operator_actor()
        prepare_data_directory(settings, make=make)

        async def hashed(password: str) -> str:
            return hash_password(password)

        async def act() -> T:
            async with open_accounts(settings.data) as accounts:
                return await work(Administration(accounts, hashed, clock=time.time), actor)

        return run_interruptible(act())


def operator_actor() -> Actor:
    """The person at the command line, as the audit log names them; behind sudo it is who called that."""
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
    """Ends the command where it is none."""
    from storage.access import AccountName

    with one_line_errors():
        return AccountName(text)


def password_or_fail(name: AccountName, file: Path | None, generate: bool) -> str | None:
    """From the file, or asked for twice at the terminal; None: one is to be made. Never from the command line, where
    every process of the machine could see it. Ends the command where it is no password."""
    from registry.auth.password.hashing import check_password

    if file and generate:
        fail("--password-file and --generate contradict each other", USAGE_ERROR)
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
        fail("there is no password on stdin" if str(file) == "-" else f"{file} holds no password")
    return line


def all_pages(page_after: Callable[[str | None], Page[T]], key: Callable[[T], str]) -> list[T]:
    """All of a list that comes in pages."""
    items: list[T] = []
    while True:
        page = page_after(key(items[-1]) if items else None)
        items += page.items
        if not page.more:
            return items


def registry_host(settings: Settings) -> str:
    """HOST:PORT for a client on this machine, or that of `public_url`."""
    from urllib.parse import urlsplit

    if settings.public_url:
        return urlsplit(settings.public_url).netloc
    host, _, port = settings.listen.rpartition(":")
    return f"localhost:{port}" if host in ("", "0.0.0.0", "[::]", "::", "*") else settings.listen


def print_first_account_notice(settings: Settings, name: str, admin: bool) -> None:
    """What the first account, of that name, means for everybody, and what comes next."""
    lines = [
        f"The registry at {settings.data.absolute()} is closed from now on: who wants something logs in, and may",
        "do what an admin granted them. Running servers know it already.",
        f"  log in          docker login {registry_host(settings)} --username {name}",
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


def print_json(items: Sequence[BaseModel] | BaseModel) -> None:
    if isinstance(items, Sequence):
        plain: Any = [each.model_dump(mode="json") for each in items]
    else:
        plain = items.model_dump(mode="json")
    typer.echo(json.dumps(plain, indent=2, ensure_ascii=False))


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
    """A table; `empty` on stderr where there are no rows."""
    from rich.text import Text

    from registry.cli.output import new_table, plain_console

    if not rows:
        typer.echo(f"entrepot: {empty}", err=True)
        return
    table = new_table(*columns)
    for row in rows:
        table.add_row(*(Text("".join(letter if letter.isprintable() else "?" for letter in cell)) for cell in row))
    plain_console().print(table)


def local_time(seconds: float | None, otherwise: str = "-") -> str:
    """Local time, to the minute."""
    return otherwise if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def comma_list(words: Sequence[str]) -> str:
    return ", ".join(words) or "-"
