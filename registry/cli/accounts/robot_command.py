"""The command `entrepot robot`: accounts of programs, such as CI jobs. A robot has no password."""

from __future__ import annotations

import typer

from registry.cli.accounts.account_actions import AccountWords, NameArgument, add_account_actions
from registry.cli.accounts.account_admin import (
    NoteOption,
    administer,
    parse_name_or_fail,
    print_first_account_notice,
    print_hints,
)
from registry.cli.options import ConfigOption, DataOption, load_or_fail
from registry.cli.output import print_line
from storage.access import AccountKind

HELP = (
    "Add, list and change accounts of programs, such as CI jobs. Robots have no password; they log in with API tokens."
)
WORDS = AccountWords(
    AccountKind.ROBOT, singular="a robot", plural="robots", possessive="its", example_name="ci", can_be_admin=False
)
"""The words for the help texts of this command."""

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)


@app.command(
    "add",
    help="Add a robot. A new robot has no rights of its own until you grant it some.",
    epilog=WORDS.examples('add ci --note "builds of the main branch"')
    + "\n\nThen: entrepot grant add 'team/**' pull,push robot:ci; entrepot token add ci",
)
def add(name: NameArgument, note: NoteOption = "", config: ConfigOption = None, data: DataOption = None) -> None:
    """Adds a robot. If it is the first account of the registry, prints that everyone has to log in from now on, and
    which commands to run next."""
    settings = load_or_fail(config, data=data).settings
    account = parse_name_or_fail(name)
    added = administer(
        config,
        data,
        lambda administration, actor: administration.add_robot(account, note=note, by=actor),
        create_data_directory=True,
    )
    print_line(f"{account} is added; to make an API token for its login, run: entrepot token add {account}", err=True)
    print_hints(added.hints)
    if added.is_first:
        print_first_account_notice(settings, account, admin=False)


add_account_actions(app, WORDS)
