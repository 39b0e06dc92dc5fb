"""The command `entrepot key`: rotates and lists the keys that sign the bearer tokens of the endpoint `/token`."""

from __future__ import annotations

from typing import Annotated

import typer

from registry.cli.accounts.account_admin import administer, print_list
from registry.cli.options import ConfigOption, DataOption, JsonOption
from registry.cli.output import local_time, print_line

HELP = "Rotate and list the keys that sign the tokens of /token."

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)


@app.command(
    "rotate",
    help="Sign new tokens with a new key from now on. Tokens that the old key signed stay valid until they expire. "
    "Browser sessions do not end; to end the sessions of an account, run 'entrepot user sessions NAME --end-all'.",
    epilog="\b\nExamples:\n  entrepot key rotate\n  entrepot key rotate --at-once",
)
def rotate(
    at_once: Annotated[
        bool,
        typer.Option(
            "--at-once",
            help="Reject tokens of older keys immediately. Use this option if an older key may have been stolen.",
        ),
    ] = False,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Adds a key, which signs all new tokens from now on. With `at_once`, the registry refuses tokens that older keys
    signed."""
    key = administer(
        config,
        data,
        lambda administration, actor: administration.rotate_key(at_once=at_once, by=actor),
        create_data_directory=True,
    )
    print_line(f"key {key.id} signs from now on", err=True)


@app.command(
    "list",
    help="List the keys whose tokens are accepted. The secrets of the keys are never shown.",
    epilog="\b\nExamples:\n  entrepot key list\n  entrepot key list --json",
)
def list_keys(config: ConfigOption = None, data: DataOption = None, as_json: JsonOption = False) -> None:
    """Prints the keys without their secrets. The column `retired` shows when a newer key replaced the key. For the key
    that signs new tokens, the column shows `signs`."""
    from registry.admin import models

    print_list(
        config,
        data,
        as_json,
        read=lambda administration: administration.accounts.signing_keys(),
        to_model=models.SigningKeyResponse.from_stored,
        columns={
            "key": lambda key: key.id,
            "created": lambda key: local_time(key.created),
            "retired": lambda key: local_time(key.retired, "signs"),
        },
        empty_message="there is no key yet; the registry creates one when it issues the first token",
    )
