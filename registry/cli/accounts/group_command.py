"""The command `entrepot group`: adds, lists and removes groups of accounts, and changes the members of groups.

A *robot* is the account of a program, such as a CI job.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.accounts.account_admin import administer, parse_name_or_fail, print_list
from registry.cli.options import ConfigOption, DataOption, JsonOption
from registry.cli.output import comma_list, print_line
from storage.access import AccountName

if TYPE_CHECKING:
    from registry.auth.administration import Administration
    from storage.content import Actor

HELP = "Add and list groups and change their members. A grant to a group applies to all of its members."

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)

GroupArgument = Annotated[str, typer.Argument(metavar="GROUP", help="The name of the group.")]
MembersArgument = Annotated[list[str], typer.Argument(metavar="MEMBER", help="Names of people and robots.")]


@app.command("add", help="Add an empty group.", epilog="\b\nExamples:\n  entrepot group add dev")
def add(group: GroupArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    """Adds a group without members."""
    name = parse_name_or_fail(group)
    administer(
        config,
        data,
        lambda administration, actor: administration.accounts.add_group(name, by=actor),
        create_data_directory=True,
    )
    print_line(f"{name} is added; to add members, run: entrepot group join {name} MEMBER...", err=True)


@app.command(
    "list",
    help="List all groups and their members.",
    epilog="\b\nExamples:\n  entrepot group list\n  entrepot group list --json",
)
def list_groups(config: ConfigOption = None, data: DataOption = None, as_json: JsonOption = False) -> None:
    """Prints all groups with their members."""
    from registry.admin import models

    print_list(
        config,
        data,
        as_json,
        read=lambda administration: administration.all_groups(),
        to_model=models.GroupResponse.from_stored,
        columns={
            "group": lambda name_and_members: name_and_members[0],
            "members": lambda name_and_members: comma_list(name_and_members[1]),
        },
        empty_message="there are no groups yet; to add one, run: entrepot group add NAME",
    )


@app.command(
    "remove",
    help="Remove a group and everything granted to it. The accounts of its members stay.",
    epilog="\b\nExamples:\n  entrepot group remove dev",
)
def remove(group: GroupArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    """Removes the group and the grants to it."""
    name = parse_name_or_fail(group)
    administer(config, data, lambda administration, actor: administration.accounts.remove_group(name, by=actor))
    print_line(f"{name} is removed", err=True)


@app.command(
    "join",
    help="Add accounts to a group.",
    epilog="""\b
Examples:
  entrepot group join dev alice bob

The accounts can be in the data directory or in an htpasswd file.""",
)
def join(group: GroupArgument, members: MembersArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    """Adds the members to the group. If one of them cannot be added, adds none. Prints a note about each member that
    has no account in the data directory, because the name may be mistyped."""
    group_name, member_names = _parse_names(group, members)

    async def work(administration: Administration, actor: Actor) -> list[AccountName]:
        await administration.accounts.add_members(group_name, member_names, by=actor)
        return [member for member in member_names if not administration.has_account(member)]

    members_without_account = administer(config, data, work)
    print_line(f"{', '.join(member_names)} joined {group_name}", err=True)
    for member in members_without_account:
        print_line(
            f"note: the data directory has no account {member}; if an htpasswd file has an account of this name, "
            "that account is now a member",
            err=True,
        )


@app.command(
    "leave",
    help="Remove accounts from a group. The accounts stay.",
    epilog="\b\nExamples:\n  entrepot group leave dev bob",
)
def leave(group: GroupArgument, members: MembersArgument, config: ConfigOption = None, data: DataOption = None) -> None:
    """Removes the members from the group. If one of them is not in the group, removes none. Their accounts stay."""
    group_name, member_names = _parse_names(group, members)

    async def work(administration: Administration, actor: Actor) -> None:
        await administration.accounts.remove_members(group_name, member_names, by=actor)

    administer(config, data, work)
    print_line(f"{', '.join(member_names)} left {group_name}", err=True)


def _parse_names(group: str, members: list[str]) -> tuple[AccountName, list[AccountName]]:
    """Returns the name of the group, and the names of the members without duplicates. Ends the command if a name is not
    valid."""
    return parse_name_or_fail(group), list(dict.fromkeys(parse_name_or_fail(member) for member in members))
