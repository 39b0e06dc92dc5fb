"""`entrepot user`: people's accounts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.administering import (
    PAGE,
    AsJson,
    Force,
    Generate,
    Note,
    PasswordFile,
    administer,
    listed,
    moment,
    print_json,
    print_rows,
    read_name,
    read_password,
    tell_closed,
    whole,
)
from registry.cli.options import ConfigFile, Data, load_or_fail

if TYPE_CHECKING:
    from registry.auth.administration import Added, Administration
    from storage.content import Actor

HELP = "People's accounts. The registry may be running."

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits, '.', '_' and '-'.")]


@app.command(
    "add",
    help="Add a person. The first account closes the registry: from then on nobody may do anything without a right.",
    epilog="""\b
Examples:
  entrepot user add alice --admin
  entrepot user add bob --note "on call"
  entrepot user add carol --password-file - < password.txt
  entrepot user add dave --generate

The password is asked for twice, or read from a file; it never stands in the command line.""",
)
def add(
    name: NameArgument,
    admin: Annotated[bool, typer.Option("--admin", help="May do everything, to every repository and account.")] = False,
    password_file: PasswordFile = None,
    generate: Generate = False,
    note: Note = "",
    config: ConfigFile = None,
    data: Data = None,
) -> None:
    settings = load_or_fail(config, data=data).settings
    account = read_name(name)
    password = read_password(account, password_file, generate)

    async def work(administration: Administration, by: Actor) -> Added:
        return await administration.add_user(account, password, admin=admin, note=note, by=by)

    added = administer(config, data, work, make=True)
    if added.password is not None:
        typer.echo(added.password)
    typer.echo(f"{account} is added{', an admin' if admin else ''}", err=True)
    if added.first:
        tell_closed(settings, account, admin)


@app.command("list", help="List the people.", epilog="\b\nExamples:\n  entrepot user list\n  entrepot user list --json")
def list_users(config: ConfigFile = None, data: Data = None, as_json: AsJson = False) -> None:
    from registry.admin import models
    from storage.access import Account, Kind

    async def work(administration: Administration, _: Actor) -> list[Account]:
        return whole(lambda after: administration.accounts.accounts(Kind.USER, after, PAGE), lambda each: each.name)

    users = administer(config, data, work)
    if as_json:
        print_json([models.Account.of(user) for user in users])
        return
    print_rows(
        ("name", "state", "admin", "groups", "created", "note"),
        [
            (
                user.name,
                "enabled" if user.enabled else "disabled",
                "admin" if user.admin else "-",
                listed(user.groups),
                moment(user.created),
                user.note,
            )
            for user in users
        ],
        "there are no people yet; entrepot user add makes one",
    )


@app.command(
    "show",
    help="Show a person, and all that they may do.",
    epilog="\b\nExamples:\n  entrepot user show alice\n  entrepot user show alice --json",
)
def show(name: NameArgument, config: ConfigFile = None, data: Data = None, as_json: AsJson = False) -> None:
    from registry.admin import models
    from storage.access import Account, Grant, Kind
    from storage.content import Page

    account_name = read_name(name)

    async def work(administration: Administration, _: Actor) -> tuple[Account, list[Grant]]:
        return administration.find(account_name, Kind.USER), administration.grants_for(account_name)

    account, grants = administer(config, data, work)
    if as_json:
        print_json(models.ShownAccount.of_both(account, Page(grants)))
        return
    typer.echo(f"{account.name}, {'enabled' if account.enabled else 'disabled'}{', an admin' if account.admin else ''}")
    for word, value in (
        ("groups", listed(account.groups)),
        ("created", moment(account.created)),
        ("note", account.note),
    ):
        typer.echo(f"  {word:<8} {value or '-'}")
    rows = [(grant.pattern, ",".join(grant.actions.words), str(grant.subject)) for grant in grants]
    empty = f"{name} may do everything" if account.admin else f"{name} was granted nothing"
    print_rows(("pattern", "actions", "as"), rows, empty)


@app.command(
    "password",
    help="Give a person another password. What was logged in with the one before ends at once.",
    epilog="\b\nExamples:\n  entrepot user password alice\n  entrepot user password alice --generate",
)
def password(
    name: NameArgument,
    password_file: PasswordFile = None,
    generate: Generate = False,
    config: ConfigFile = None,
    data: Data = None,
) -> None:
    account = read_name(name)
    new = read_password(account, password_file, generate)

    async def work(administration: Administration, by: Actor) -> str | None:
        return await administration.set_password(account, new, by=by)

    made = administer(config, data, work)
    if made is not None:
        typer.echo(made)
    typer.echo(f"{account} has another password", err=True)


@app.command(
    "disable",
    help="Lock a person out, at their next request. Account, groups and grants stay.",
    epilog="\b\nExamples:\n  entrepot user disable bob",
)
def disable(name: NameArgument, force: Force = False, config: ConfigFile = None, data: Data = None) -> None:
    _set_enabled(name, False, force, config, data)


@app.command(
    "enable", help="Let a person in again who was disabled.", epilog="\b\nExamples:\n  entrepot user enable bob"
)
def enable(name: NameArgument, config: ConfigFile = None, data: Data = None) -> None:
    _set_enabled(name, True, False, config, data)


def _set_enabled(name: str, enabled: bool, force: bool, config: Path | None, data: str | None) -> None:
    from storage.access import Kind

    account = read_name(name)

    async def work(administration: Administration, by: Actor) -> None:
        await administration.set_enabled(account, Kind.USER, enabled, force=force, by=by)

    administer(config, data, work)
    typer.echo(f"{account} is {'enabled' if enabled else 'disabled'}", err=True)


@app.command(
    "admin",
    help="Make a person an admin, who may do everything; with --off no longer.",
    epilog="\b\nExamples:\n  entrepot user admin alice\n  entrepot user admin bob --off",
)
def admin(
    name: NameArgument,
    off: Annotated[bool, typer.Option("--off", help="No admin any more.")] = False,
    force: Force = False,
    config: ConfigFile = None,
    data: Data = None,
) -> None:
    account = read_name(name)

    async def work(administration: Administration, by: Actor) -> None:
        await administration.set_admin(account, not off, force=force, by=by)

    administer(config, data, work)
    typer.echo(f"{account} is {'no admin any more' if off else 'an admin'}", err=True)


@app.command(
    "remove",
    help="Remove a person, with their API tokens, memberships and grants.",
    epilog="\b\nExamples:\n  entrepot user remove bob",
)
def remove(name: NameArgument, force: Force = False, config: ConfigFile = None, data: Data = None) -> None:
    from storage.access import Kind

    account = read_name(name)

    async def work(administration: Administration, by: Actor) -> None:
        await administration.remove(account, Kind.USER, force=force, by=by)

    administer(config, data, work)
    typer.echo(f"{account} is removed", err=True)
