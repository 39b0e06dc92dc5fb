"""The command `entrepot user`: adds, shows and changes people's accounts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.accounts.account_actions import AccountWords, NameArgument, add_account_actions, state_text
from registry.cli.accounts.account_admin import (
    ForceOption,
    GenerateOption,
    NoteOption,
    PasswordFileOption,
    administer,
    has_had_account,
    parse_name_or_fail,
    password_or_fail,
    print_first_account_notice,
    print_hints,
    print_list,
    read_password_file,
)
from registry.cli.options import ConfigOption, DataOption, JsonOption, load_or_fail
from registry.cli.output import comma_list, local_time, print_json, print_line, print_rows
from storage.access import Account, AccountKind, Grant

if TYPE_CHECKING:
    from registry.auth.administration import Administration
    from storage.content import Actor

HELP = "Add, list and change people's accounts. This is also possible while a server is running."
WORDS = AccountWords(
    AccountKind.USER, singular="a person", plural="people", possessive="their", example_name="bob", can_be_admin=True
)
"""The words for the help texts of this command."""

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)


@app.command(
    "add",
    help="Add a person. The first account closes the registry: from then on everyone has to log in, and can do only "
    "what they were granted.",
    epilog="""\b
Examples:
  entrepot user add alice --admin
  entrepot user add bob --note "on call"
  entrepot user add carol --password-file - < password.txt
  entrepot user add dave --generate
  entrepot user add admin --admin --if-first --password-file admin.password

The command asks for the password, reads it from a file or generates one. A password is never an argument, since
every process on the machine can read the arguments of a command.""",
)
def add(
    name: NameArgument,
    admin: Annotated[
        bool, typer.Option("--admin", help="Allow everything, on every repository and every account.")
    ] = False,
    if_first: Annotated[
        bool,
        typer.Option(
            "--if-first",
            help="Do nothing if the registry has or had an account, so that a container can run this command at each "
            "start.",
        ),
    ] = False,
    password_file: PasswordFileOption = None,
    generate: GenerateOption = False,
    note: NoteOption = "",
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Adds a person's account. Prints a generated password on stdout and everything else on stderr. If the account is
    the registry's first, prints that everyone has to log in from now on, and which commands to run next."""
    settings = load_or_fail(config, data=data).settings
    account = parse_name_or_fail(name)
    file_text = None
    if if_first:
        file_text = read_password_file(password_file)
        if has_had_account(settings):
            print_line(f"{account} is not added: the registry has or had an account", err=True)
            return
    password = password_or_fail(account, password_file, generate, file_text)
    added = administer(
        config,
        data,
        lambda administration, actor: administration.add_user(account, password, admin=admin, note=note, by=actor),
        create_data_directory=True,
    )
    if added.password is not None:
        print_line(added.password)
    print_line(f"{account} is added{', an admin' if admin else ''}", err=True)
    print_hints(added.hints)
    if added.is_first:
        print_first_account_notice(settings, account, admin)


add_account_actions(app, WORDS)


@app.command(
    "show",
    help="Show a person and everything that they can do.",
    epilog=WORDS.examples("show alice", "show alice --json"),
)
def show(name: NameArgument, config: ConfigOption = None, data: DataOption = None, as_json: JsonOption = False) -> None:
    """Prints the account and the grants that apply to it: grants to the account, to its groups, to `authenticated` (all
    accounts) and to `everyone` (all accounts, and clients without an account)."""
    from registry.admin import models
    from storage.content import Page

    account_name = parse_name_or_fail(name)

    async def work(administration: Administration, _: Actor) -> tuple[Account, list[Grant]]:
        return administration.find_account(account_name, AccountKind.USER), administration.grants_for(account_name)

    account, grants = administer(config, data, work)
    if as_json:
        print_json(models.AccountWithGrants.from_stored_with_grants(account, Page(grants)))
        return
    print_line(f"{account.name}, {state_text(account)}{', an admin' if account.admin else ''}")
    facts = {"groups": comma_list(account.groups), "created": local_time(account.created), "note": account.note or "-"}
    for label, value in facts.items():
        print_line(f"  {label:<8} {value}")
    rows = [(grant.pattern, ",".join(grant.actions.words), str(grant.subject)) for grant in grants]
    empty_message = f"{name} is an admin and can do everything" if account.admin else f"nothing is granted to {name}"
    print_rows(("pattern", "actions", "granted to"), rows, empty_message)


@app.command(
    "password",
    help="Set a new password. Clients and browsers that logged in with the old one are logged out. API tokens stay "
    "valid.",
    epilog=WORDS.examples("password alice", "password alice --generate"),
)
def password(
    name: NameArgument,
    password_file: PasswordFileOption = None,
    generate: GenerateOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Sets the password. Prints a generated password on stdout and everything else on stderr."""
    account = parse_name_or_fail(name)
    new_password = password_or_fail(account, password_file, generate)
    generated = administer(
        config, data, lambda administration, actor: administration.set_password(account, new_password, by=actor)
    )
    if generated is not None:
        print_line(generated)
    print_line(f"{account} has a new password", err=True)


@app.command(
    "admin",
    help="Make a person an admin, who can do everything. With --off, make an admin an ordinary account.",
    epilog=WORDS.examples("admin alice", "admin bob --off"),
)
def admin(
    name: NameArgument,
    off: Annotated[bool, typer.Option("--off", help="The person is no longer an admin.")] = False,
    force: ForceOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Makes the person an admin, or with `off` an ordinary account."""
    account = parse_name_or_fail(name)
    administer(
        config,
        data,
        lambda administration, actor: administration.set_admin(account, admin=not off, force=force, by=actor),
    )
    print_line(f"{account} is {'no longer an admin' if off else 'an admin'}", err=True)


@app.command(
    "sessions",
    help="List the browsers in which a person is logged in, or end their sessions.",
    epilog=WORDS.examples("sessions alice", "sessions alice --end 3f0c11d2a94b7e6655", "sessions alice --end-all")
    + "\n\nA request with an ended session is refused, on every worker of a running server.",
)
def sessions(
    name: NameArgument,
    end: Annotated[
        list[str] | None, typer.Option("--end", metavar="ID", help="End this session. Repeat for more.")
    ] = None,
    end_all: Annotated[bool, typer.Option("--end-all", help="End all sessions of the person.")] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prints the person's sessions. With `end_all`, ends them all instead. With `end`, ends the sessions with these ids
    instead, in order. At the first id that is no session of this person, ends the command with an error, and
    ends no more sessions."""
    from registry.admin import models
    from storage.access import AccountUnknown

    account = parse_name_or_fail(name)

    async def end_chosen_sessions(administration: Administration, actor: Actor) -> None:
        if end_all:
            count = await administration.end_sessions(account, by=actor)
            print_line(f"{count} session{'' if count == 1 else 's'} of {account} ended", err=True)
            return
        for session_id in end or ():
            if session_id not in [session.id for session in administration.sessions(account)]:
                # This is also the store's error for a session that does not exist.
                raise AccountUnknown(f"{account} has no session {session_id}, or that session has ended")
            await administration.end_session(session_id, by=actor)
            print_line(f"{session_id} is ended", err=True)

    if end or end_all:
        administer(config, data, end_chosen_sessions)
        return
    print_list(
        config,
        data,
        as_json,
        read=lambda administration: administration.sessions(account),
        to_model=models.LoginSessionResponse.from_stored,
        columns={
            "id": lambda session: session.id,
            "logged in": lambda session: local_time(session.created),
            "with": lambda session: session.method,
            "from": lambda session: session.address or "-",
            "browser": lambda session: session.user_agent[:40] or "-",
            "last seen": lambda session: local_time(session.seen),
            "expires": lambda session: local_time(session.expires),
        },
        empty_message=f"{account} is not logged in with a browser",
    )
