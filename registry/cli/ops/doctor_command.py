"""The command `entrepot doctor`: looks for problems of the registry and its machine, and says how to solve them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec

import typer

from registry.cli.options import ConfigOption, DataOption, JsonOption, ListenOption, MirrorOption

if TYPE_CHECKING:
    from registry.cli.diagnosis.finding import Check, Finding
    from registry.config import Settings
    from registry.config.settings_sources import LoadedSettings

P = ParamSpec("P")
HELP = (
    "Look for what is wrong: settings, disk, file system, database, clock, certificate, host names, upstreams, logins, "
    "the registry's address, and the clients of this machine. Each finding says what to do. The exit code is 1 if "
    "there is a problem. Works with and without a running server, and changes nothing."
)
EXAMPLES = (
    "\b\nExamples:\n  entrepot doctor -c /etc/entrepot/entrepot.toml\n  entrepot doctor --offline --json\n"
    "  sudo entrepot doctor -c /etc/entrepot/entrepot.toml\n\n"
    "Run the command as root if only root can read the server's key or the clients' files."
)


def doctor(
    offline: Annotated[
        bool, typer.Option("--offline", help="Connect to nothing: neither to upstreams nor to the registry.")
    ] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    listen: ListenOption = None,
    mirror: MirrorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prints the findings, and ends the command: with exit code 1 if at least one finding is a problem, otherwise with
    exit code 0."""
    from registry.cli.diagnosis.finding import problem
    from registry.cli.diagnosis.finding_output import print_findings
    from registry.config.settings_sources import ConfigError, load_settings

    flags = {"data": data, "listen": listen, "mirror": mirror}
    try:
        loaded = load_settings({name: value for name, value in flags.items() if value}, config)
    except ConfigError as error:
        next_step = "correct the setting; `entrepot config` shows all settings and where each comes from"
        findings = [problem("settings", str(error), "the server does not start", next_step)]
        raise typer.Exit(print_findings(findings, as_json=as_json)) from None
    raise typer.Exit(print_findings(diagnose(loaded, config, offline=offline), as_json=as_json))


def diagnose(
    loaded: LoadedSettings, config: Path | None = None, *, offline: bool = False, clock: Callable[[], float] = time.time
) -> list[Finding]:
    """Runs all checks and returns their findings. `config`: the value of --config. `offline`: whether to leave out the
    checks that connect to the network. `clock` returns seconds since 1970. Must be called in the main thread.

    A process that runs as root first reads the files that only root can read. Then it becomes the user who owns the
    data directory."""
    import os

    from registry.cli.data_owner import OwnerError, become_owner
    from registry.cli.diagnosis.certificate_checks import certificate_findings
    from registry.cli.diagnosis.clock_checks import clock_findings
    from registry.cli.diagnosis.data_checks import disk_responds
    from registry.cli.diagnosis.finding import CHECK_SECONDS, problem, run_checks
    from registry.cli.diagnosis.server_checks import settings_findings
    from registry.cli.interrupts import run_interruptible
    from registry.clients.registry_address import registry_address
    from registry.config.settings_sources import CONFIG_VARIABLE

    settings, address = loaded.settings, registry_address(loaded.settings)
    has_file = config is not None or bool(os.environ.get(CONFIG_VARIABLE))
    findings = settings_findings(settings, loaded.warnings, has_file=has_file)
    # Runs in this thread: `become_owner` below has to be called while there is no other thread.
    findings += run_interruptible(
        run_checks({"certificate": partial(_in_this_thread, certificate_findings, settings, address.url, clock())})
    )
    client_findings = run_interruptible(run_checks(_client_checks(settings)))
    is_disk_hung = not disk_responds(settings.data)
    if is_disk_hung:
        what = f"the disk of {settings.data.absolute()} did not respond within {CHECK_SECONDS:g} s"
        next_step = "look at the log of the kernel (dmesg) for errors of the disk, and at the mount"
        findings.append(problem("data directory", what, "the server hangs as well", next_step))
    else:
        try:
            become_owner(settings.data)
        except OwnerError as error:
            findings.append(problem("data directory", str(error), "", "run the command as that user"))
    dates: dict[str, tuple[str, float]] = {}
    checks = _checks(settings, dates, offline=offline, clock=clock)
    if not is_disk_hung:
        checks = {**_data_checks(settings, clock), **checks}
    findings += run_interruptible(run_checks(checks))
    return [*findings, *clock_findings(clock(), dates), *client_findings]


def _checks(
    settings: Settings, dates: dict[str, tuple[str, float]], *, offline: bool, clock: Callable[[], float]
) -> dict[str, Check]:
    """Returns the checks of the server and the upstreams, by name. The checks of the upstreams add entries to `dates`:
    the key is the URL of an endpoint, and the value is the Date header of a response and the response's arrival time in
    seconds since 1970."""
    from registry.cli.diagnosis.server_checks import ServerCheck, hashing_findings, open_files_findings
    from registry.clients.registry_address import registry_address

    server = ServerCheck(settings, registry_address(settings), clock)
    checks: dict[str, Check] = {
        "open files": open_files_findings,
        "hashing": hashing_findings,
        "server": server.check_server,
    }
    if offline:
        return checks
    checks["address"] = server.check_address
    if settings.upstream:
        from registry.cli.diagnosis.upstream_checks import upstream_checks

        def on_date(url: str, text: str, arrived: float) -> None:
            dates[url] = text, arrived

        for upstream in settings.upstream:
            checks |= upstream_checks(upstream, on_date, clock)
    return checks


def _data_checks(settings: Settings, clock: Callable[[], float]) -> dict[str, Check]:
    """Returns the checks of the data directory, by name."""
    from registry.cli.diagnosis.clock_checks import CHECK as CLOCK_CHECK
    from registry.cli.diagnosis.clock_checks import file_clock_findings
    from registry.cli.diagnosis.data_checks import data_checks
    from registry.cli.diagnosis.finding import in_thread

    return {
        **data_checks(settings),
        CLOCK_CHECK: lambda: in_thread(lambda: file_clock_findings(clock(), settings.data)),
    }


async def _in_this_thread(
    check: Callable[P, Sequence[Finding]], *args: P.args, **kwargs: P.kwargs
) -> Sequence[Finding]:
    """Runs a blocking check in the thread of the event loop, and starts no other thread."""
    return check(*args, **kwargs)


def _client_checks(settings: Settings) -> dict[str, Check]:
    """Returns the checks of the client programs of this machine, by name. Returns no checks if the registry mirrors no
    hosts, or if the registry's port is not known (port 0)."""
    from registry.cli.diagnosis.client_check import installed_programs
    from registry.clients.client_setup import mirrored_hosts
    from registry.clients.registry_address import registry_address

    if not any(mirrored_hosts(upstream) for upstream in settings.upstream):
        return {}
    if registry_address(settings).url.endswith(":0"):
        return {}
    return {
        f"client {program}": partial(_in_this_thread, _client_findings, settings, program)
        for program in installed_programs()
    }


def _client_findings(settings: Settings, program: str) -> list[Finding]:
    """Returns the findings about a client program of this machine. If any finding is a warning or a problem, returns
    one warning, with the text of the first of these findings. A client need not use this registry, so this function
    never returns a problem."""
    from registry.cli.diagnosis.client_check import check_client
    from registry.cli.diagnosis.finding import Level, warning
    from registry.clients.client_setup import mirrored_hosts
    from registry.clients.registry_address import registry_address

    hosts = [host for upstream in settings.upstream for host in mirrored_hosts(upstream)]
    findings = check_client(program, registry_address(settings), hosts, settings.default_upstream, offline=True)
    first_bad = next((finding for finding in findings if finding.level is not Level.OK), None)
    if first_bad is None:
        return findings
    next_step = f"if {program} shall use this registry, `entrepot client check {program}` says what to write"
    return [warning(f"client {program}", first_bad.what, first_bad.why, next_step)]
