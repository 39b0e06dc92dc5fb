"""The command `entrepot grant`: adds, lists and removes grants.

A *grant* gives a *subject* the right to some actions on the repositories whose names match a *pattern*. The subject
(class `Grantee`) is one account, a group, all accounts, or everyone. The account of a program is a *robot*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.accounts.account_admin import administer, parse_name_or_fail, print_list
from registry.cli.options import USAGE_ERROR, ConfigOption, DataOption, JsonOption, fail, load_or_fail, one_line_errors
from registry.cli.output import print_json, print_line, print_rows
from storage.access import Grant, Grantee

if TYPE_CHECKING:
    from collections.abc import Iterable

    from registry.auth.administration import Administration
    from registry.auth.rights.explanation import RightsExplanation
    from storage.content import Actor

HELP = "Add, list and remove rights on repositories. Grants only add rights; no grant takes a right away."

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)

PatternArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATTERN",
        help="Repositories: a name, or a prefix that ends with * or **, quoted for the shell: 'team/app-*', 'team/**'.",
    ),
]
SubjectsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SUBJECT",
        help="Who: user:NAME, robot:NAME, group:NAME, authenticated (all accounts) or everyone (even without a login).",
    ),
]


@app.command(
    "add",
    help="Grant actions on repositories. Replaces the subject's earlier grant for the same pattern.",
    epilog="""\b
Examples:
  entrepot grant add 'team/**' pull,push group:dev
  entrepot grant add '**' pull everyone
  entrepot grant add 'docker.io/**' pull authenticated
  entrepot grant add 'team/**' '*' user:alice robot:release

A pattern is an exact name, or a prefix that ends with * (any text without a slash) or ** (any text).

Actions are pull, push, delete and admin; '*' means all of them. No action includes another: to push, an account
needs pull,push. admin is the right to add and remove grants for repositories that match the pattern. For mirrored
repositories, write the upstream's name in the pattern, as in 'docker.io/**', even if clients leave that name out.""",
)
def add(
    pattern: PatternArgument,
    actions: Annotated[str, typer.Argument(metavar="ACTIONS", help="Actions joined by commas, such as pull,push.")],
    subjects: SubjectsArgument,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Adds one grant for each subject. If an argument is not valid, or a grant is refused, ends the command and adds no
    grant."""
    from registry.auth.administration import parse_actions, parse_pattern

    with one_line_errors():
        parsed_pattern, parsed_actions = parse_pattern(pattern), parse_actions(actions)
        grants = [Grant(Grantee.parse(subject), parsed_pattern, parsed_actions) for subject in subjects]
    administer(
        config,
        data,
        lambda administration, actor: administration.put_grants(grants, by=actor),
        create_data_directory=True,
    )
    for grant in grants:
        print_line(f"{grant.subject} may {', '.join(parsed_actions.words)} {parsed_pattern}", err=True)


@app.command(
    "list",
    help="List the grants.",
    epilog="""\b
Examples:
  entrepot grant list
  entrepot grant list --subject group:dev
  entrepot grant list --for alice --json

--for shows all grants that apply to an account: the grants to the account, to its groups, to 'authenticated'
and to 'everyone'.""",
)
def list_grants(
    subject: Annotated[
        str | None, typer.Option("--subject", metavar="SUBJECT", help="Only grants to this subject.")
    ] = None,
    account: Annotated[
        str | None, typer.Option("--for", metavar="NAME", help="All grants that apply to this account.")
    ] = None,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prints all grants, the grants to one subject, or the grants that apply to one account."""
    from registry.admin import models

    if subject and account:
        fail("--subject and --for contradict each other; give one of them", USAGE_ERROR)
    name = None if account is None else parse_name_or_fail(account)
    with one_line_errors():
        parsed_subjects = None if subject is None else [Grantee.parse(subject)]

    def read(administration: Administration) -> Iterable[Grant]:
        return administration.grants_for(name) if name else administration.accounts.grants(parsed_subjects)

    print_list(
        config,
        data,
        as_json,
        read=read,
        to_model=models.GrantResponse.from_stored,
        columns={
            "pattern": lambda grant: grant.pattern,
            "actions": lambda grant: ",".join(grant.actions.words),
            "subject": lambda grant: str(grant.subject),
        },
        empty_message="nothing is granted; to grant something, run: entrepot grant add PATTERN ACTIONS SUBJECT",
    )


@app.command(
    "explain",
    help="Show what an account may do on a repository, and by which grants.",
    epilog="""\b
Examples:
  entrepot grant explain team/app --for alice
  entrepot grant explain ubuntu --for ci --json
  entrepot grant explain team/app

Without --for, the command shows what clients may do without a login. The result leaves out
groups that an OpenID provider names at a login, and the limits of API tokens.""",
)
def explain(
    repository: Annotated[str, typer.Argument(metavar="REPO", help="A repository, as clients call it.")],
    account: Annotated[
        str | None, typer.Option("--for", metavar="NAME", help="The account of a person or robot.")
    ] = None,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prints what the account may do on the repository, and the grants that allow it. A name without a host, such as
    `ubuntu`, can mean two repositories: one to which clients push, and one that is mirrored from the default upstream.
    The command then prints the rights on both. Ends with an error if `repository` is not a valid name, or is only the
    name of an upstream."""
    from storage.names import RepositoryName

    settings = load_or_fail(config, data=data).settings
    name = None if account is None else parse_name_or_fail(account)
    with one_line_errors():
        repo = RepositoryName(repository)

    async def work(administration: Administration, _: Actor) -> RightsExplanation:
        from registry.auth.revocation import RevocationCheck
        from registry.auth.rights.explanation import explain_rights
        from registry.auth.rights.policy import Policy

        accounts = administration.accounts
        return await explain_rights(Policy.from_settings(settings, accounts, RevocationCheck(accounts)), name, repo)

    explanation = administer(config, data, work)
    if as_json:
        from registry.admin.rights_models import RightsResponse

        print_json(RightsResponse.from_explanation(explanation))
        return
    _print_explanation(explanation)


def _print_explanation(explanation: RightsExplanation) -> None:
    client_name = explanation.account or "a client without a login"
    for rights in explanation.repositories:
        mirrored = "" if rights.upstream is None else f", which is mirrored from {rights.upstream}"
        print_line(f"{client_name} may {', '.join(rights.actions.words) or 'do nothing'} on {rights.name}{mirrored}")
    for applies, note in (
        (explanation.is_registry_open, "there are no accounts yet, so grants do not matter"),
        (explanation.is_admin, f"{client_name} is an admin, so grants do not matter"),
        (not explanation.is_enabled, f"{client_name} is disabled"),
        (
            explanation.account and not explanation.is_stored,
            f"the store has no account {client_name}; an htpasswd file may have it",
        ),
    ):
        if applies:
            print_line(f"entrepot: {note}", err=True)
    grants = dict.fromkeys(grant for rights in explanation.repositories for grant in rights.grants)
    rows = [(grant.pattern, ",".join(grant.actions.words), str(grant.subject)) for grant in grants]
    if rows:
        print_rows(("pattern", "actions", "granted to"), rows, "")


@app.command(
    "remove",
    help="Remove each subject's grant for the pattern.",
    epilog="\b\nExamples:\n  entrepot grant remove 'team/**' group:dev",
)
def remove(
    pattern: PatternArgument, subjects: SubjectsArgument, config: ConfigOption = None, data: DataOption = None
) -> None:
    """Removes the grants for the pattern, one subject after another. Stops at the first subject without a
    grant for the pattern, and does not restore the grants that were already removed."""
    from registry.auth.administration import parse_pattern

    with one_line_errors():
        parsed_pattern = parse_pattern(pattern)
        parsed_subjects = [Grantee.parse(subject) for subject in subjects]

    async def work(administration: Administration, actor: Actor) -> None:
        for subject in parsed_subjects:
            await administration.remove_grant(subject, parsed_pattern, by=actor)
            print_line(f"{subject} has no grant for {parsed_pattern} any more", err=True)

    administer(config, data, work)
