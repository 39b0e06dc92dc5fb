"""The subcommands that `entrepot user` and `entrepot robot` have in common: list, disable, enable and remove.

A *robot* is the account of a program, such as a CI job.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.accounts.account_admin import (
    PAGE_SIZE,
    ForceOption,
    administer,
    parse_name_or_fail,
    print_list,
    read_all_pages,
)
from registry.cli.options import ConfigOption, DataOption, JsonOption
from registry.cli.output import comma_list, local_time, print_line
from storage.access import Account, AccountKind, AccountName

if TYPE_CHECKING:
    from registry.auth.administration import Administration
    from storage.content import Actor

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="At most 64 lower-case letters, digits, '.', '_' and '-'.")
]


@dataclass(frozen=True, slots=True)
class AccountWords:
    """The differences between the commands for people and for robots: the words of their help texts, and whether the
    account can be an admin."""

    kind: AccountKind
    """The kind of account. Its value, such as `user`, is also the name of the command."""
    singular: str
    """The noun with its article: `a person`."""
    plural: str
    """The noun in the plural: `people`."""
    possessive: str
    """The possessive pronoun: `their` for a person, `its` for a robot."""
    example_name: str
    """The account name in the examples of the help texts."""
    can_be_admin: bool
    """Whether an account of this kind can be an admin. If it can, the subcommands disable and remove have the option
    --force. With --force, they also disable or remove the last enabled admin."""

    def examples(self, *lines: str) -> str:
        """Returns the section with examples for the end of a help page. `lines`: the example commands without
        `entrepot user` or `entrepot robot` at the beginning, such as `add bob`."""
        # The backspace character makes click keep the line breaks of the text that follows.
        return "\b\nExamples:\n" + "\n".join(f"  entrepot {self.kind} {line}" for line in lines)


def add_account_actions(app: typer.Typer, words: AccountWords) -> None:
    """Adds the subcommands list, disable, enable and remove to `app`, which is `entrepot user` or `entrepot robot`."""
    _add_list_command(app, words)
    _add_change_command(
        app,
        words,
        "disable",
        f"Refuse all further requests of {words.singular}. {words.possessive.capitalize()} groups, grants and API "
        "tokens stay.",
        lambda administration, name, force, actor: administration.set_enabled(
            name, words.kind, enabled=False, force=force, by=actor
        ),
        has_force_option=words.can_be_admin,
    )
    _add_change_command(
        app,
        words,
        "enable",
        f"Undo 'disable': {words.singular} can log in again.",
        lambda administration, name, _, actor: administration.set_enabled(name, words.kind, enabled=True, by=actor),
    )
    _add_change_command(
        app,
        words,
        "remove",
        f"Remove {words.singular} for good, with {words.possessive} API tokens, memberships and grants.",
        lambda administration, name, force, actor: administration.remove(name, words.kind, force=force, by=actor),
        has_force_option=words.can_be_admin,
    )


def _add_list_command(app: typer.Typer, words: AccountWords) -> None:
    """Adds the subcommand list to `app`."""
    columns: dict[str, Callable[[Account], str]] = {"name": lambda account: account.name, "state": state_text}
    if words.can_be_admin:
        columns["admin"] = lambda account: "admin" if account.admin else "-"
    columns["groups"] = lambda account: comma_list(account.groups)
    columns["created"] = lambda account: local_time(account.created)
    columns["note"] = lambda account: account.note

    @app.command("list", help=f"List all {words.plural}.", epilog=words.examples("list", "list --json"))
    def list_accounts(config: ConfigOption = None, data: DataOption = None, as_json: JsonOption = False) -> None:
        from registry.admin import models

        print_list(
            config,
            data,
            as_json,
            read=lambda administration: read_all_pages(
                lambda after: administration.accounts.accounts(words.kind, after, PAGE_SIZE),
                lambda account: account.name,
            ),
            to_model=models.AccountResponse.from_stored,
            columns=columns,
            empty_message=f"there are no {words.plural} yet; to add one, run: entrepot {words.kind} add NAME",
        )


def _add_change_command(
    app: typer.Typer,
    words: AccountWords,
    verb: str,
    help_text: str,
    change: Callable[[Administration, AccountName, bool, Actor], Awaitable[None]],
    *,
    has_force_option: bool = False,
) -> None:
    """Adds the subcommand `verb` to `app`. The subcommand calls `change` for the account that the user names.

    The arguments of `change` are the `Administration` (the object that changes accounts), the account's name, whether
    the option --force was given, and the *actor* (who makes the change, for the audit log). `has_force_option`: whether
    the subcommand has the option --force."""
    register = app.command(verb, help=help_text, epilog=words.examples(f"{verb} {words.example_name}"))

    def run(name: str, config: Path | None, data: str | None, force: bool) -> None:
        account = parse_name_or_fail(name)
        administer(config, data, lambda administration, actor: change(administration, account, force, actor))
        print_line(f"{account} is {verb.removesuffix('e')}ed", err=True)

    if has_force_option:

        @register
        def change_with_force(
            name: NameArgument, force: ForceOption = False, config: ConfigOption = None, data: DataOption = None
        ) -> None:
            run(name, config, data, force)

    else:

        @register
        def change_without_force(name: NameArgument, config: ConfigOption = None, data: DataOption = None) -> None:
            run(name, config, data, force=False)


def state_text(account: Account) -> str:
    """Returns `enabled` or `disabled`."""
    return "enabled" if account.enabled else "disabled"
