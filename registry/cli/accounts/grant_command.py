"""The command `entrepot grant`: who can do what with which repositories."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.accounts.account_admin import account_name_or_fail, administer, print_list
from registry.cli.options import USAGE_ERROR, ConfigOption, DataOption, JsonOption, fail, one_line_errors
from storage.access import Grant, Grantee

if TYPE_CHECKING:
    from collections.abc import Iterable

    from registry.auth.administration import Administration
    from storage.content import Actor

HELP = "Grant rights on repositories, list them and take them back. Grants add up; no grant takes away from another."

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)

PatternArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATTERN",
        help="Repositories: a name, or a prefix with * or ** at its end: 'team/app-*', 'team/**', '**'. Quote it.",
    ),
]
SubjectsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SUBJECT",
        help="Who: user:NAME, robot:NAME, group:NAME, authenticated (every account) or everyone (without a login too).",
    ),
]


@app.command(
    "add",
    help="Grant actions on repositories. Replaces what the subject was granted for the same pattern.",
    epilog="""\b
Examples:
  entrepot grant add 'team/**' pull,push group:dev
  entrepot grant add '**' pull everyone
  entrepot grant add 'docker.io/**' pull authenticated
  entrepot grant add 'team/**' '*' user:alice robot:release

A pattern is an exact name, or a prefix that ends with * (any text without a slash) or ** (any text).

Actions are pull, push, delete and admin; '*' means all of them. No action includes another: to push, an account
needs pull,push. admin is the right to grant on repositories that match the pattern. Names of mirrored repositories
begin with the upstream's name, however clients ask for them.""",
)
def add(
    pattern: PatternArgument,
    actions: Annotated[str, typer.Argument(metavar="ACTIONS", help="Actions joined by commas, such as pull,push.")],
    subjects: SubjectsArgument,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Adds one grant for each subject."""
    from registry.auth.administration import parse_actions, parse_pattern

    with one_line_errors():
        names, granted = parse_pattern(pattern), parse_actions(actions)
        grants = [Grant(Grantee.parse(subject), names, granted) for subject in subjects]
    administer(config, data, lambda administration, by: administration.put_grants(grants, by=by), create=True)
    for grant in grants:
        typer.echo(f"{grant.subject} may {', '.join(granted.words)} {names}", err=True)


@app.command(
    "list",
    help="List the grants.",
    epilog="""\b
Examples:
  entrepot grant list
  entrepot grant list --subject group:dev
  entrepot grant list --for alice --json

--for shows everything that counts for an account: its own grants and those of its groups, of authenticated and
of everyone.""",
)
def list_grants(
    subject: Annotated[
        str | None, typer.Option("--subject", metavar="SUBJECT", help="Only grants to this subject.")
    ] = None,
    account: Annotated[
        str | None, typer.Option("--for", metavar="NAME", help="All grants that count for this account.")
    ] = None,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prints the grants."""
    from registry.admin import models

    if subject and account:
        fail("--subject and --for contradict each other; give one of them", USAGE_ERROR)
    name = None if account is None else account_name_or_fail(account)
    with one_line_errors():
        subjects = None if subject is None else [Grantee.parse(subject)]

    def read(administration: Administration) -> Iterable[Grant]:
        return administration.grants_for(name) if name else administration.accounts.grants(subjects)

    print_list(
        config,
        data,
        as_json,
        read=read,
        model=models.GrantResponse.from_stored,
        columns={
            "pattern": lambda grant: grant.pattern,
            "actions": lambda grant: ",".join(grant.actions.words),
            "subject": lambda grant: str(grant.subject),
        },
        empty="nothing is granted; entrepot grant add PATTERN ACTIONS SUBJECT grants something",
    )


@app.command(
    "remove",
    help="Take back everything that subjects were granted for a pattern.",
    epilog="\b\nExamples:\n  entrepot grant remove 'team/**' group:dev",
)
def remove(
    pattern: PatternArgument, subjects: SubjectsArgument, config: ConfigOption = None, data: DataOption = None
) -> None:
    """Removes one grant for each subject."""
    from registry.auth.administration import parse_pattern

    with one_line_errors():
        names = parse_pattern(pattern)
        parsed = [Grantee.parse(subject) for subject in subjects]

    async def work(administration: Administration, by: Actor) -> None:
        for subject in parsed:
            await administration.remove_grant(subject, names, by=by)
            typer.echo(f"{subject} has no grant for {names} any more", err=True)

    administer(config, data, work)
