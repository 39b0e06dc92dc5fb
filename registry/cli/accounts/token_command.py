"""`entrepot token`: API tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.accounts.account_admin import (
    PAGE_SIZE,
    JsonOption,
    NoteOption,
    account_name_or_fail,
    administer,
    all_pages,
    local_time,
    print_json,
    print_rows,
    registry_host,
)
from registry.cli.options import ConfigOption, DataOption, load_or_fail, one_line_errors

if TYPE_CHECKING:
    from registry.auth.administration import Administration
    from storage.access import ApiToken
    from storage.content import Actor

HELP = "API tokens: secrets that people and robots log in with in place of a password."

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)


@app.command(
    "add",
    help="Make an API token for a person or a robot. Its secret is printed this once, and kept nowhere.",
    epilog="""\b
Examples:
  entrepot token add ci
  entrepot token add alice --note laptop --expires 90d
  entrepot token add ci --allow 'team/**:pull,push' --allow 'base/*:pull'
  entrepot token add ci > ci.secret

The secret goes to stdout, what to do with it to stderr. --allow takes away: what the account may not do, none of
its tokens may. Patterns are those of entrepot grant add.""",
)
def add(
    account: Annotated[str, typer.Argument(metavar="ACCOUNT", help="Whose it is.")],
    note: NoteOption = "",
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="TIME", help="In what time, such as 90d. [default: never]")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow",
            metavar="PATTERN:ACTIONS",
            help="Limit it to that; may be given again. [default: all that ACCOUNT may do]",
        ),
    ] = None,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    from registry.admin import models
    from registry.auth.administration import parse_limit

    name = account_name_or_fail(account)
    with one_line_errors():
        limits = [parse_limit(text) for text in allow or []]
        expires_in = None if expires is None else models.parse_seconds(expires)

    async def work(administration: Administration, by: Actor) -> tuple[ApiToken, str]:
        return await administration.add_token(name, note=note, expires_in=expires_in, limits=limits, by=by)

    token, secret = administer(config, data, work)
    typer.echo(secret)
    host = registry_host(load_or_fail(config, data=data).settings)
    lines = [
        f"token {token.id} of {name}, {f'until {local_time(token.expires)}' if token.expires else 'without end'}; "
        "the secret is shown this once",
        f'  log in   echo "$TOKEN" | docker login {host} --username {name} --password-stdin',
        f"  revoke   entrepot token revoke {token.id}",
    ]
    typer.echo("\n".join(lines), err=True)


@app.command(
    "list",
    help="List API tokens, never their secrets. Those of the purpose login were given to clients at a login.",
    epilog="\b\nExamples:\n  entrepot token list\n  entrepot token list ci --json",
)
def list_tokens(
    account: Annotated[str | None, typer.Argument(metavar="[ACCOUNT]", help="Only its tokens.")] = None,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    from registry.admin import models

    name = None if account is None else account_name_or_fail(account)

    async def work(administration: Administration, _: Actor) -> list[ApiToken]:
        if name is not None:
            administration.accounts.account(name)
        return all_pages(lambda after: administration.accounts.tokens(name, after, PAGE_SIZE), lambda each: each.id)

    tokens = administer(config, data, work)
    if as_json:
        print_json([models.Token.of(token) for token in tokens])
        return
    rows = [
        (
            each.id,
            each.account,
            each.purpose,
            _limits(each),
            local_time(each.created),
            local_time(each.expires, "never"),
            local_time(each.used, "never"),
            each.note,
        )
        for each in tokens
    ]
    columns = ("id", "account", "purpose", "limited to", "created", "expires", "last used", "note")
    print_rows(columns, rows, "there are no API tokens; entrepot token add makes one")


def _limits(token: ApiToken) -> str:
    if token.limits is None:
        return "-"
    return " ".join(f"{limit.pattern}:{','.join(limit.actions.words)}" for limit in token.limits)


@app.command(
    "revoke",
    help="Revoke API tokens: they count no more at the next request.",
    epilog="\b\nExamples:\n  entrepot token revoke 3fk2m7q4",
)
def revoke(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="As entrepot token list shows it, not the secret.")],
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    async def work(administration: Administration, by: Actor) -> None:
        for token_id in ids:
            await administration.revoke_token(token_id, by=by)
            typer.echo(f"{token_id} is revoked", err=True)

    administer(config, data, work)
