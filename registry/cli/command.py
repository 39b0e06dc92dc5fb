"""The command `entrepot` and the list of its subcommands, which other modules implement."""

from __future__ import annotations

from typing import Annotated

import typer

from registry.cli import client_command, config_command, events_command, inspect_command, live_commands, serve_command
from registry.cli.accounts import (
    audit_command,
    grant_command,
    group_command,
    key_command,
    robot_command,
    token_command,
    user_command,
)
from registry.cli.command_line import CommandLine
from registry.cli.mirror import freeze_command, mirror_command, speed_command
from registry.cli.ops import doctor_command, status_command
from registry.cli.output import print_line
from registry.cli.upkeep import (
    backup_command,
    cache_command,
    export_command,
    fsck_command,
    gc_command,
    import_command,
    import_config_command,
    import_registry_command,
    jobs_command,
    quota_command,
    restore_command,
    retention_command,
    scrub_command,
    tag_command,
)

app = typer.Typer(
    cls=CommandLine,
    help="A Docker/OCI registry that needs nothing else installed: no database server, no cache server.",
    epilog="To start a registry on this machine: entrepot serve. More on each command: entrepot COMMAND --help.",
    no_args_is_help=True,
    rich_markup_mode=None,  # prints help and usage errors as plain text, which is also readable in a log
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve", help=serve_command.HELP, epilog=serve_command.EXAMPLES)(serve_command.serve)
app.command("reload", help=live_commands.RELOAD_HELP, epilog=live_commands.RELOAD_EXAMPLES)(live_commands.reload)
app.command("restart", help=live_commands.RESTART_HELP, epilog=live_commands.RESTART_EXAMPLES)(live_commands.restart)
app.command("config", help=config_command.HELP, epilog=config_command.EXAMPLES)(config_command.config)
app.command("inspect", help=inspect_command.HELP, epilog=inspect_command.EXAMPLES)(inspect_command.inspect)
app.command("status", help=status_command.HELP, epilog=status_command.EXAMPLES)(status_command.status)
app.command("doctor", help=doctor_command.HELP, epilog=doctor_command.EXAMPLES)(doctor_command.doctor)
app.add_typer(client_command.app, name="client")
app.add_typer(mirror_command.app, name="mirror")
mirror_command.app.command("freeze", help=freeze_command.FREEZE_HELP, epilog=freeze_command.FREEZE_EXAMPLES)(
    freeze_command.freeze
)
mirror_command.app.command("unfreeze", help=freeze_command.UNFREEZE_HELP, epilog=freeze_command.UNFREEZE_EXAMPLES)(
    freeze_command.unfreeze
)
mirror_command.app.command("frozen", help=freeze_command.FROZEN_HELP, epilog=freeze_command.FROZEN_EXAMPLES)(
    freeze_command.list_frozen
)
# `entrepot mirror test` measures the speed of the endpoints of upstreams.
mirror_command.app.command("test", help=speed_command.HELP, epilog=speed_command.EXAMPLES)(speed_command.measure)
app.add_typer(user_command.app, name="user")
app.add_typer(robot_command.app, name="robot")
app.add_typer(token_command.app, name="token")
app.add_typer(group_command.app, name="group")
app.add_typer(grant_command.app, name="grant")
app.add_typer(key_command.app, name="key")
app.add_typer(cache_command.app, name="cache")
app.add_typer(quota_command.app, name="quota")
app.add_typer(jobs_command.app, name="jobs")
app.add_typer(tag_command.app, name="tag")
app.add_typer(retention_command.app, name="retention")
app.command("fsck", help=fsck_command.HELP, epilog=fsck_command.EXAMPLES)(fsck_command.fsck)
app.command("gc", help=gc_command.HELP, epilog=gc_command.EXAMPLES)(gc_command.gc)
app.add_typer(scrub_command.app, name="scrub")
app.command("backup", help=backup_command.HELP, epilog=backup_command.EXAMPLES)(backup_command.backup)
app.command("restore", help=restore_command.HELP, epilog=restore_command.EXAMPLES)(restore_command.restore)
app.command("export", help=export_command.HELP, epilog=export_command.EXAMPLES)(export_command.export)
app.command("import", help=import_command.HELP, epilog=import_command.EXAMPLES)(import_command.import_images)
app.command("import-registry", help=import_registry_command.HELP, epilog=import_registry_command.EXAMPLES)(
    import_registry_command.import_registry
)
app.command("import-config", help=import_config_command.HELP, epilog=import_config_command.EXAMPLES)(
    import_config_command.import_config
)
app.add_typer(events_command.app, name="events")
app.command("audit", help=audit_command.HELP, epilog=audit_command.EXAMPLES)(audit_command.audit)


def _print_version(is_requested: bool) -> None:
    """If the option --version is given, prints the version and ends the command."""
    if is_requested:
        from registry import __version__

        print_line(f"entrepot {__version__}")
        raise typer.Exit


@app.callback()
def entrepot(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Declares the options that come before the subcommand. The option's callback, `_print_version`, does the work."""
