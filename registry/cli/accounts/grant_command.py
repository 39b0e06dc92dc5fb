"""`entrepot grant`: who may do what to which repositories."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.accounts.account_admin import JsonOption, account_name_or_fail, administer, print_json, print_rows
from registry.cli.options import USAGE_ERROR, ConfigOption, DataOption, fail, one_line_errors

if TYPE_CHECKING:
    from registry.auth.administration import Administration
    from storage.access import Grant
    from storage.content import Actor

HELP = "Rights: who may do what to which repositories. They only add up."

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)

PatternArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATTERN", help="A name, or a prefix with * or ** at its end: 'team/app-*', 'team/**', '**'. Quote it."
    ),
]
Subjects = Annotated[
    list[str],
    typer.Argument(metavar="SUBJECT...", help="user:NAME, robot:NAME, group:NAME, authenticated or everyone."),
]


@app.command(
    "add",
    help="Grant actions on repositories, in place of what the subject had for that pattern.",
    epilog="""\b
Examples:
  entrepot grant add 'team/**' pull,push group:dev
  entrepot grant add '**' pull everyone
  entrepot grant add 'docker.io/**' pull authenticated
  entrepot grant add 'team/**' '*' user:alice robot:release

A pattern is an exact name, or a prefix that ends with * (any text without a slash) or ** (any text).

Actions are pull, push, delete and admin, which is the right to grant below the pattern; '*' is all of them. None
implies another. What is mirrored has the upstream's name before its own, however it is asked for.""",
)
def add(
    pattern: PatternArgument,
    actions: Annotated[str, typer.Argument(metavar="ACTIONS", help="Such as pull,push.")],
    subjects: Subjects,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    from registry.auth.administration import parse_actions, parse_pattern
    from storage.access import Grant, Grantee

    with one_line_errors():
        names, granted = parse_pattern(pattern), parse_actions(actions)
        grants = [Grant(Grantee.parse(subject), names, granted) for subject in subjects]

    async def work(administration: Administration, by: Actor) -> None:
        await administration.put_grants(grants, by=by)

    administer(config, data, work, make=True)
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

--for shows all that counts for an account: its own, its groups', every account's and everybody's.""",
)
def list_grants(
    subject: Annotated[str | None, typer.Option("--subject", metavar="SUBJECT", help="Only of this subject.")] = None,
    account: Annotated[str | None, typer.Option("--for", metavar="NAME", help="All that count for this one.")] = None,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    from registry.admin import models
    from storage.access import Grantee

    if subject and account:
        fail("--subject and --for contradict each other", USAGE_ERROR)
    name = None if account is None else account_name_or_fail(account)
    with one_line_errors():
        subjects = None if subject is None else [Grantee.parse(subject)]

    async def work(administration: Administration, _: Actor) -> list[Grant]:
        return administration.grants_for(name) if name else administration.accounts.grants(subjects)

    grants = administer(config, data, work)
    if as_json:
        print_json([models.Grant.of(grant) for grant in grants])
        return
    rows = [(grant.pattern, ",".join(grant.actions.words), str(grant.subject)) for grant in grants]
    print_rows(("pattern", "actions", "subject"), rows, "nothing is granted; entrepot grant add does that")


@app.command(
    "remove",
    help="Take back what subjects were granted for a pattern.",
    epilog="\b\nExamples:\n  entrepot grant remove 'team/**' group:dev",
)
def remove(pattern: PatternArgument, subjects: Subjects, config: ConfigOption = None, data: DataOption = None) -> None:
    from registry.auth.administration import parse_pattern
    from storage.access import Grantee

    with one_line_errors():
        names = parse_pattern(pattern)
        whose = [Grantee.parse(subject) for subject in subjects]

    async def work(administration: Administration, by: Actor) -> None:
        for subject in whose:
            await administration.remove_grant(subject, names, by=by)
            typer.echo(f"{subject} has no grant for {names} any more", err=True)

    administer(config, data, work)
