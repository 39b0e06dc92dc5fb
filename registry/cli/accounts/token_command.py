"""The command `entrepot token`: adds, lists and revokes API tokens. A client can log in to an account with an API token
instead of the password.

A *robot* is the account of a program. A robot has no password. It logs in with an API token, or with a token of a
trusted issuer, such as a CI service (`[[issuer]]` in the settings).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.accounts.account_admin import (
    PAGE_SIZE,
    NoteOption,
    administer,
    parse_name_or_fail,
    print_list,
    read_all_pages,
)
from registry.cli.options import ConfigOption, DataOption, JsonOption, load_or_fail, one_line_errors
from registry.cli.output import local_time, print_line, print_text
from registry.clients.registry_address import registry_address
from storage.access import ApiToken

if TYPE_CHECKING:
    from registry.auth.administration import Administration
    from storage.content import Actor

HELP = "Add, list and revoke API tokens. People and robots log in with them instead of a password."

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)


@app.command(
    "add",
    help="Add an API token for a person or a robot, and print the token's secret. Copy it now: it is stored nowhere.",
    epilog="""\b
Examples:
  entrepot token add ci
  entrepot token add alice --note laptop --expires 90d
  entrepot token add ci --allow 'team/**:pull,push' --allow 'base/*:pull'
  entrepot token add ci > ci.secret

Prints only the secret on stdout. Prints on stderr how to use and revoke the token. --allow gives the token no right
that the account does not have. PATTERN and ACTIONS are written as for `entrepot grant add`.""",
)
def add(
    account: Annotated[str, typer.Argument(metavar="ACCOUNT", help="The person or robot that logs in with the token.")],
    note: NoteOption = "",
    expires: Annotated[
        str | None,
        typer.Option("--expires", metavar="TIME", help="How long the token is valid, such as 90d. [default: for ever]"),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow",
            metavar="PATTERN:ACTIONS",
            help="Limit the token to these actions. Repeat for more. [default: everything that ACCOUNT may do]",
        ),
    ] = None,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Adds an API token and prints its secret on stdout. Ends the command if an option is not valid."""
    from registry.admin import models
    from registry.auth.administration import parse_limit

    name = parse_name_or_fail(account)
    with one_line_errors():
        limits = [parse_limit(text) for text in allow or []]
        expires_in = None if expires is None else models.parse_seconds(expires)

    async def work(administration: Administration, actor: Actor) -> tuple[ApiToken, str]:
        return await administration.add_token(name, note=note, expires_in=expires_in, limits=limits, by=actor)

    token, secret = administer(config, data, work)
    print_line(secret)
    valid = f"valid until {local_time(token.expires)}" if token.expires else "valid for ever"
    host = registry_address(load_or_fail(config, data=data).settings).host
    lines = [
        f"token {token.id} of {name}, {valid}; its secret is not shown again",
        f'  log in   echo "$TOKEN" | docker login {host} --username {name} --password-stdin',
        f"  revoke   entrepot token revoke {token.id}",
    ]
    print_text("\n".join(lines), err=True)


@app.command(
    "list",
    help="List API tokens, without their secrets. Purpose `login`: a client got this token at a login, and stores the "
    "token instead of the password.",
    epilog="\b\nExamples:\n  entrepot token list\n  entrepot token list ci --json",
)
def list_tokens(
    account: Annotated[str | None, typer.Argument(metavar="ACCOUNT", help="Only tokens of this account.")] = None,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prints the tokens of all accounts, or those of `account`. Ends the command if `account` does not exist."""
    from registry.admin import models

    name = None if account is None else parse_name_or_fail(account)

    def read(administration: Administration) -> Iterable[ApiToken]:
        if name is not None:
            administration.accounts.account(name)  # raises AccountUnknown
        return read_all_pages(
            lambda after: administration.accounts.tokens(name, after, PAGE_SIZE), lambda token: token.id
        )

    print_list(
        config,
        data,
        as_json,
        read=read,
        to_model=models.ApiTokenResponse.from_stored,
        columns={
            "id": lambda token: token.id,
            "account": lambda token: token.account,
            "purpose": lambda token: token.purpose,
            "limited to": _limits_text,
            "created": lambda token: local_time(token.created),
            "expires": lambda token: local_time(token.expires, "never"),
            "last used": lambda token: local_time(token.used, "never"),
            "note": lambda token: token.note,
        },
        empty_message="there are no API tokens; to add one, run: entrepot token add ACCOUNT",
    )


def _limits_text(token: ApiToken) -> str:
    """Returns the limits in the form `PATTERN:ACTIONS`, separated by spaces; `-` if the token has no limits."""
    if token.limits is None:
        return "-"
    return " ".join(f"{limit.pattern}:{','.join(limit.actions.words)}" for limit in token.limits)


@app.command(
    "revoke",
    help="Revoke API tokens. The registry then refuses every request with one of these tokens.",
    epilog="\b\nExamples:\n  entrepot token revoke 3fk2m7q4",
)
def revoke(
    ids: Annotated[list[str], typer.Argument(metavar="ID", help="The token's id in entrepot token list.")],
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Revokes the tokens one after another. Ends the command at the first id that does not exist. The tokens before
    this id stay revoked."""

    async def work(administration: Administration, actor: Actor) -> None:
        for token_id in ids:
            await administration.revoke_token(token_id, by=actor)
            print_line(f"{token_id} is revoked", err=True)

    administer(config, data, work)
