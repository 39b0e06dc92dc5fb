"""`entrepot key`: the keys that sign tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.accounts.account_admin import JsonOption, administer, local_time, print_json, print_rows
from registry.cli.options import ConfigOption, DataOption

if TYPE_CHECKING:
    from registry.auth.administration import Administration
    from storage.access import SigningKey
    from storage.content import Actor

HELP = "The keys that sign the tokens of /token."

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)


@app.command(
    "rotate",
    help="Sign with a new key from now on. Tokens of the one before are taken until they expire.",
    epilog="\b\nExamples:\n  entrepot key rotate\n  entrepot key rotate --at-once",
)
def rotate(
    at_once: Annotated[
        bool, typer.Option("--at-once", help="Take no more tokens of the one before: others may have that key.")
    ] = False,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    async def work(administration: Administration, by: Actor) -> SigningKey:
        return await administration.rotate_key(at_once=at_once, by=by)

    key = administer(config, data, work, make=True)
    typer.echo(f"key {key.id} signs from now on", err=True)


@app.command(
    "list",
    help="List the keys that count, never their secrets.",
    epilog="\b\nExamples:\n  entrepot key list\n  entrepot key list --json",
)
def list_keys(config: ConfigOption = None, data: DataOption = None, as_json: JsonOption = False) -> None:
    from registry.admin import models

    async def work(administration: Administration, _: Actor) -> list[SigningKey]:
        return administration.accounts.signing_keys()

    keys = administer(config, data, work)
    if as_json:
        print_json([models.Key.of(key) for key in keys])
        return
    rows = [(key.id, local_time(key.created), local_time(key.retired, "signs")) for key in keys]
    print_rows(("key", "created", "retired"), rows, "there is no key yet; the server makes one at its first start")
