"""The command `entrepot`: its sub-commands, one a module."""

from __future__ import annotations

from typing import Annotated

import typer

from registry.cli import audit, client, config, grant, group, inspect, key, mirror, robot, serve, token, user

app = typer.Typer(
    help="A Docker/OCI registry in one process tree, with nothing else to install.",
    epilog="`entrepot serve --help` is a good start.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help and one-line usage errors, the same in a terminal and in a log
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve", help=serve.HELP, epilog=serve.EXAMPLES)(serve.serve)
app.command("config", help=config.HELP, epilog=config.EXAMPLES)(config.config)
app.command("inspect", help=inspect.HELP, epilog=inspect.EXAMPLES)(inspect.inspect)
app.command("client", help=client.HELP, epilog=client.EXAMPLES)(client.client)
app.add_typer(mirror.app, name="mirror")
app.add_typer(user.app, name="user")
app.add_typer(robot.app, name="robot")
app.add_typer(token.app, name="token")
app.add_typer(group.app, name="group")
app.add_typer(grant.app, name="grant")
app.add_typer(key.app, name="key")
app.command("audit", help=audit.HELP, epilog=audit.EXAMPLES)(audit.audit)


def _version(wanted: bool) -> None:
    if wanted:
        from registry import __version__

        typer.echo(f"entrepot {__version__}")
        raise typer.Exit


@app.callback()
def entrepot(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """What holds for every sub-command."""
