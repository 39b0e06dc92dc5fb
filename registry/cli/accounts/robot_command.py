"""`entrepot robot`: accounts of programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.accounts.account_admin import (
    PAGE_SIZE,
    JsonOption,
    NoteOption,
    account_name_or_fail,
    administer,
    all_pages,
    comma_list,
    local_time,
    print_first_account_notice,
    print_json,
    print_rows,
)
from registry.cli.options import ConfigOption, DataOption, load_or_fail

if TYPE_CHECKING:
    from registry.auth.administration import Administration
    from storage.access import Account
    from storage.content import Actor

HELP = "Accounts of programs, such as CI jobs. They have no password and log in with API tokens."

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits, '.', '_' and '-'.")]


@app.command(
    "add",
    help="Add a robot. It may do nothing until something is granted to it.",
    epilog="""\b
Examples:
  entrepot robot add ci --note "builds of the main branch"

Then: entrepot grant add 'team/**' pull,push robot:ci; entrepot token add ci""",
)
def add(name: NameArgument, note: NoteOption = "", config: ConfigOption = None, data: DataOption = None) -> None:
    account = account_name_or_fail(name)

    async def work(administration: Administration, by: Actor) -> bool:
        return (await administration.add_robot(account, note=note, by=by)).first

    settings = load_or_fail(config, data=data).settings
    first = administer(config, data, work, make=True)
    typer.echo(f"{account} is added; entrepot token add {account} makes what it logs in with", err=True)
    if first:
        print_first_account_notice(settings, account, admin=False)


@app.command(
    "list", help="List the robots.", epilog="\b\nExamples:\n  entrepot robot list\n  entrepot robot list --json"
)
def list_robots(config: ConfigOption = None, data: DataOption = None, as_json: JsonOption = False) -> None:
    from registry.admin import models
    from storage.access import AccountKind

    async def work(administration: Administration, _: Actor) -> list[Account]:
        return all_pages(
            lambda after: administration.accounts.accounts(AccountKind.ROBOT, after, PAGE_SIZE), lambda each: each.name
        )

    robots = administer(config, data, work)
    if as_json:
        print_json([models.Account.of(robot) for robot in robots])
        return
    rows = [
        (
            each.name,
            "enabled" if each.enabled else "disabled",
            comma_list(each.groups),
            local_time(each.created),
            each.note,
        )
        for each in robots
    ]
    columns = ("name", "state", "groups", "created", "note")
    print_rows(columns, rows, "there are no robots yet; entrepot robot add makes one")


@app.command(
    "disable",
    help="Lock a robot out, at its next request. Tokens and grants stay.",
    epilog="\b\nExamples:\n  entrepot robot disable ci",
)
def disable(name: NameArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    _set_enabled(name, False, config, data)


@app.command("enable", help="Let a robot in again.", epilog="\b\nExamples:\n  entrepot robot enable ci")
def enable(name: NameArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    _set_enabled(name, True, config, data)


def _set_enabled(name: str, enabled: bool, config: Path | None, data: str | None) -> None:
    from storage.access import AccountKind

    account = account_name_or_fail(name)

    async def work(administration: Administration, by: Actor) -> None:
        await administration.set_enabled(account, AccountKind.ROBOT, enabled, by=by)

    administer(config, data, work)
    typer.echo(f"{account} is {'enabled' if enabled else 'disabled'}", err=True)


@app.command(
    "remove",
    help="Remove a robot, with its API tokens, memberships and grants.",
    epilog="\b\nExamples:\n  entrepot robot remove ci",
)
def remove(name: NameArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    from storage.access import AccountKind

    account = account_name_or_fail(name)

    async def work(administration: Administration, by: Actor) -> None:
        await administration.remove(account, AccountKind.ROBOT, by=by)

    administer(config, data, work)
    typer.echo(f"{account} is removed", err=True)
