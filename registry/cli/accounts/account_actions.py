"""The commands that people's accounts and robots have in common: list, disable, enable and remove."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.accounts.account_admin import (
    PAGE_SIZE,
    ForceOption,
    account_name_or_fail,
    administer,
    all_pages,
    print_list,
)
from registry.cli.options import ConfigOption, DataOption, JsonOption
from registry.cli.output import comma_list, local_time
from storage.access import Account, AccountKind, AccountName

if TYPE_CHECKING:
    from registry.auth.administration import Administration
    from storage.content import Actor

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Lower-case letters, digits, '.', '_' and '-', at most 64.")
]


@dataclass(frozen=True, slots=True)
class AccountWords:
    """How the commands for one kind of account are worded, and whether such an account can be an admin."""

    kind: AccountKind
    """The kind of account, whose value is also the command's name: `user`."""
    one: str
    """`a person`."""
    many: str
    """`people`."""
    their: str
    """`their` or `its`."""
    example: str
    """The name in the examples of the help texts."""
    can_be_admin: bool

    def examples(self, *lines: str) -> str:
        """Returns the examples at the end of a help text. Each line begins after `entrepot KIND`."""
        return "\b\nExamples:\n" + "\n".join(f"  entrepot {self.kind} {line}" for line in lines)


def add_account_actions(app: typer.Typer, words: AccountWords) -> None:
    """Adds the commands list, disable, enable and remove to `app`."""
    _add_list(app, words)
    _add_change(
        app,
        words,
        "disable",
        f"Refuse {words.one}'s next request and all later ones. {words.their.capitalize()} groups, grants and API "
        "tokens stay.",
        lambda administration, name, force, by: administration.set_enabled(name, words.kind, False, force=force, by=by),
        takes_force=words.can_be_admin,
    )
    _add_change(
        app,
        words,
        "enable",
        f"Let {words.one} in again who was disabled.",
        lambda administration, name, _, by: administration.set_enabled(name, words.kind, True, by=by),
    )
    _add_change(
        app,
        words,
        "remove",
        f"Remove {words.one} for good. {words.their.capitalize()} API tokens, memberships and grants go too.",
        lambda administration, name, force, by: administration.remove(name, words.kind, force=force, by=by),
        takes_force=words.can_be_admin,
    )


def _add_list(app: typer.Typer, words: AccountWords) -> None:
    columns: dict[str, Callable[[Account], str]] = {"name": lambda account: account.name, "state": state_text}
    if words.can_be_admin:
        columns["admin"] = lambda account: "admin" if account.admin else "-"
    columns["groups"] = lambda account: comma_list(account.groups)
    columns["created"] = lambda account: local_time(account.created)
    columns["note"] = lambda account: account.note

    @app.command("list", help=f"List all {words.many}.", epilog=words.examples("list", "list --json"))
    def list_accounts(config: ConfigOption = None, data: DataOption = None, as_json: JsonOption = False) -> None:
        from registry.admin import models

        print_list(
            config,
            data,
            as_json,
            read=lambda administration: all_pages(
                lambda after: administration.accounts.accounts(words.kind, after, PAGE_SIZE),
                lambda account: account.name,
            ),
            model=models.AccountResponse.from_stored,
            columns=columns,
            empty=f"there are no {words.many} yet; entrepot {words.kind} add NAME adds one",
        )


def _add_change(
    app: typer.Typer,
    words: AccountWords,
    verb: str,
    text: str,
    change: Callable[[Administration, AccountName, bool, Actor], Awaitable[None]],
    *,
    takes_force: bool = False,
) -> None:
    """Adds the command `verb`, which runs `change` on one account. `takes_force`: with the option --force."""
    register = app.command(verb, help=text, epilog=words.examples(f"{verb} {words.example}"))

    def run(name: str, config: Path | None, data: str | None, force: bool) -> None:
        account = account_name_or_fail(name)
        administer(config, data, lambda administration, by: change(administration, account, force, by))
        typer.echo(f"{account} is {verb.removesuffix('e')}ed", err=True)

    if takes_force:

        @register
        def with_force(
            name: NameArgument, force: ForceOption = False, config: ConfigOption = None, data: DataOption = None
        ) -> None:
            run(name, config, data, force)

    else:

        @register
        def without_force(name: NameArgument, config: ConfigOption = None, data: DataOption = None) -> None:
            run(name, config, data, False)


def state_text(account: Account) -> str:
    """Returns `enabled` or `disabled`."""
    return "enabled" if account.enabled else "disabled"
