"""`entrepot group`: groups of accounts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.accounts.account_admin import (
    JsonOption,
    account_name_or_fail,
    administer,
    comma_list,
    print_json,
    print_rows,
)
from registry.cli.options import ConfigOption, DataOption

if TYPE_CHECKING:
    from registry.auth.administration import Administration, GroupMembers
    from storage.access import AccountName
    from storage.content import Actor

HELP = "Groups: what is granted to one, all of its members may do."

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)

GroupArgument = Annotated[str, typer.Argument(metavar="GROUP", help="Lower-case letters, digits, '.', '_' and '-'.")]
Members = Annotated[list[str], typer.Argument(metavar="MEMBER...", help="People and robots.")]


@app.command("add", help="Add a group without members.", epilog="\b\nExamples:\n  entrepot group add dev")
def add(group: GroupArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    name = account_name_or_fail(group)

    async def work(administration: Administration, by: Actor) -> None:
        await administration.accounts.add_group(name, by=by)

    administer(config, data, work, make=True)
    typer.echo(f"{name} is added; entrepot group join {name} MEMBER... fills it", err=True)


@app.command(
    "list",
    help="List the groups and their members.",
    epilog="\b\nExamples:\n  entrepot group list\n  entrepot group list --json",
)
def list_groups(config: ConfigOption = None, data: DataOption = None, as_json: JsonOption = False) -> None:
    from registry.admin import models

    async def work(administration: Administration, _: Actor) -> list[GroupMembers]:
        return list(administration.all_groups())

    groups = administer(config, data, work)
    if as_json:
        print_json([models.Group.of(group) for group in groups])
        return
    rows = [(name, comma_list(members)) for name, members in groups]
    print_rows(("group", "members"), rows, "there are no groups yet; entrepot group add makes one")


@app.command(
    "remove",
    help="Remove a group, and what was granted to it. Its members stay.",
    epilog="\b\nExamples:\n  entrepot group remove dev",
)
def remove(group: GroupArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    name = account_name_or_fail(group)

    async def work(administration: Administration, by: Actor) -> None:
        await administration.accounts.remove_group(name, by=by)

    administer(config, data, work)
    typer.echo(f"{name} is removed", err=True)


@app.command(
    "join",
    help="Make accounts members of a group.",
    epilog="""\b
Examples:
  entrepot group join dev alice bob

A member may be one who is known from htpasswd or an issuer alone.""",
)
def join(group: GroupArgument, members: Members, config: ConfigOption = None, data: DataOption = None) -> None:
    name, names = account_name_or_fail(group), [account_name_or_fail(member) for member in members]

    async def work(administration: Administration, by: Actor) -> list[AccountName]:
        for member in names:
            await administration.accounts.add_member(name, member, by=by)
        return [member for member in names if not administration.is_known(member)]

    unknown = administer(config, data, work)
    typer.echo(f"{', '.join(names)} joined {name}", err=True)
    for member in unknown:
        typer.echo(f"note: there is no account {member} here; it counts for one of htpasswd or an issuer", err=True)


@app.command(
    "leave",
    help="Take members out of a group.",
    epilog="\b\nExamples:\n  entrepot group leave dev bob",
)
def leave(group: GroupArgument, members: Members, config: ConfigOption = None, data: DataOption = None) -> None:
    name, names = account_name_or_fail(group), [account_name_or_fail(member) for member in members]

    async def work(administration: Administration, by: Actor) -> None:
        for member in names:
            await administration.accounts.remove_member(name, member, by=by)

    administer(config, data, work)
    typer.echo(f"{', '.join(names)} left {name}", err=True)
