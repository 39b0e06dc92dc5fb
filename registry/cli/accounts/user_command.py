"""`entrepot user`: people's accounts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.accounts.account_admin import (
    PAGE_SIZE,
    ForceOption,
    GenerateOption,
    JsonOption,
    NoteOption,
    PasswordFileOption,
    account_name_or_fail,
    administer,
    all_pages,
    comma_list,
    local_time,
    password_or_fail,
    print_first_account_notice,
    print_json,
    print_rows,
)
from registry.cli.options import ConfigOption, DataOption, load_or_fail

if TYPE_CHECKING:
    from registry.auth.administration import AddedAccount, Administration
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
    password_file: PasswordFileOption = None,
    generate: GenerateOption = False,
    note: NoteOption = "",
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    settings = load_or_fail(config, data=data).settings
    account = account_name_or_fail(name)
    password = password_or_fail(account, password_file, generate)

    async def work(administration: Administration, by: Actor) -> AddedAccount:
        return await administration.add_user(account, password, admin=admin, note=note, by=by)

    added = administer(config, data, work, make=True)
    if added.password is not None:
        typer.echo(added.password)
    typer.echo(f"{account} is added{', an admin' if admin else ''}", err=True)
    if added.first:
        print_first_account_notice(settings, account, admin)


@app.command("list", help="List the people.", epilog="\b\nExamples:\n  entrepot user list\n  entrepot user list --json")
def list_users(config: ConfigOption = None, data: DataOption = None, as_json: JsonOption = False) -> None:
    from registry.admin import models
    from storage.access import Account, AccountKind

    async def work(administration: Administration, _: Actor) -> list[Account]:
        return all_pages(
            lambda after: administration.accounts.accounts(AccountKind.USER, after, PAGE_SIZE), lambda each: each.name
        )

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
                comma_list(user.groups),
                local_time(user.created),
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
def show(name: NameArgument, config: ConfigOption = None, data: DataOption = None, as_json: JsonOption = False) -> None:
    from registry.admin import models
    from storage.access import Account, AccountKind, Grant
    from storage.content import Page

    account_name = account_name_or_fail(name)

    async def work(administration: Administration, _: Actor) -> tuple[Account, list[Grant]]:
        return administration.find(account_name, AccountKind.USER), administration.grants_for(account_name)

    account, grants = administer(config, data, work)
    if as_json:
        print_json(models.ShownAccount.of_both(account, Page(grants)))
        return
    typer.echo(f"{account.name}, {'enabled' if account.enabled else 'disabled'}{', an admin' if account.admin else ''}")
    for word, value in (
        ("groups", comma_list(account.groups)),
        ("created", local_time(account.created)),
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
    password_file: PasswordFileOption = None,
    generate: GenerateOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    account = account_name_or_fail(name)
    new = password_or_fail(account, password_file, generate)

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
def disable(
    name: NameArgument, force: ForceOption = False, config: ConfigOption = None, data: DataOption = None
) -> None:
    _set_enabled(name, False, force, config, data)


@app.command(
    "enable", help="Let a person in again who was disabled.", epilog="\b\nExamples:\n  entrepot user enable bob"
)
def enable(name: NameArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    _set_enabled(name, True, False, config, data)


def _set_enabled(name: str, enabled: bool, force: bool, config: Path | None, data: str | None) -> None:
    from storage.access import AccountKind

    account = account_name_or_fail(name)

    async def work(administration: Administration, by: Actor) -> None:
        await administration.set_enabled(account, AccountKind.USER, enabled, force=force, by=by)

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
    force: ForceOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    account = account_name_or_fail(name)

    async def work(administration: Administration, by: Actor) -> None:
        await administration.set_admin(account, not off, force=force, by=by)

    administer(config, data, work)
    typer.echo(f"{account} is {'no admin any more' if off else 'an admin'}", err=True)


@app.command(
    "remove",
    help="Remove a person, with their API tokens, memberships and grants.",
    epilog="\b\nExamples:\n  entrepot user remove bob",
)
def remove(
    name: NameArgument, force: ForceOption = False, config: ConfigOption = None, data: DataOption = None
) -> None:
    from storage.access import AccountKind

    account = account_name_or_fail(name)

    async def work(administration: Administration, by: Actor) -> None:
        await administration.remove(account, AccountKind.USER, force=force, by=by)

    administer(config, data, work)
    typer.echo(f"{account} is removed", err=True)
