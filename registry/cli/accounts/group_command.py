"""The command `entrepot group`: groups of accounts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.accounts.account_admin import account_name_or_fail, administer, print_list
from registry.cli.options import ConfigOption, DataOption, JsonOption
from registry.cli.output import comma_list
from storage.access import AccountName

if TYPE_CHECKING:
    from registry.auth.administration import Administration
    from storage.content import Actor

HELP = "Add, list and fill groups. What is granted to a group, all of its members can do."

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)

GroupArgument = Annotated[str, typer.Argument(metavar="GROUP", help="Lower-case letters, digits, '.', '_' and '-'.")]
MembersArgument = Annotated[list[str], typer.Argument(metavar="MEMBER", help="Names of people and robots.")]


@app.command("add", help="Add an empty group.", epilog="\b\nExamples:\n  entrepot group add dev")
def add(group: GroupArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    """Adds the group."""
    name = account_name_or_fail(group)
    administer(config, data, lambda administration, by: administration.accounts.add_group(name, by=by), create=True)
    typer.echo(f"{name} is added; entrepot group join {name} MEMBER... adds members", err=True)


@app.command(
    "list",
    help="List all groups and their members.",
    epilog="\b\nExamples:\n  entrepot group list\n  entrepot group list --json",
)
def list_groups(config: ConfigOption = None, data: DataOption = None, as_json: JsonOption = False) -> None:
    """Prints the groups."""
    from registry.admin import models

    print_list(
        config,
        data,
        as_json,
        read=lambda administration: administration.all_groups(),
        model=models.GroupResponse.from_stored,
        columns={"group": lambda group: group[0], "members": lambda group: comma_list(group[1])},
        empty="there are no groups yet; entrepot group add NAME adds one",
    )


@app.command(
    "remove",
    help="Remove a group and everything granted to it. The accounts of its members stay.",
    epilog="\b\nExamples:\n  entrepot group remove dev",
)
def remove(group: GroupArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    """Removes the group."""
    name = account_name_or_fail(group)
    administer(config, data, lambda administration, by: administration.accounts.remove_group(name, by=by))
    typer.echo(f"{name} is removed", err=True)


@app.command(
    "join",
    help="Add accounts to a group.",
    epilog="""\b
Examples:
  entrepot group join dev alice bob

A member may also be an account that exists only in an htpasswd file or at an issuer.""",
)
def join(group: GroupArgument, members: MembersArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    """Adds the members. Says which of them have no account here, since that may be a typing error."""
    name, names = _names(group, members)

    async def work(administration: Administration, by: Actor) -> list[AccountName]:
        for member in names:
            await administration.accounts.add_member(name, member, by=by)
        return [member for member in names if not administration.is_known(member)]

    unknown = administer(config, data, work)
    typer.echo(f"{', '.join(names)} joined {name}", err=True)
    for member in unknown:
        typer.echo(
            f"note: there is no account {member} here; the membership counts for {member} of htpasswd or an issuer",
            err=True,
        )


@app.command(
    "leave",
    help="Take accounts out of a group.",
    epilog="\b\nExamples:\n  entrepot group leave dev bob",
)
def leave(group: GroupArgument, members: MembersArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    """Removes the members."""
    name, names = _names(group, members)

    async def work(administration: Administration, by: Actor) -> None:
        for member in names:
            await administration.accounts.remove_member(name, member, by=by)

    administer(config, data, work)
    typer.echo(f"{', '.join(names)} left {name}", err=True)


def _names(group: str, members: list[str]) -> tuple[AccountName, list[AccountName]]:
    return account_name_or_fail(group), [account_name_or_fail(member) for member in members]
