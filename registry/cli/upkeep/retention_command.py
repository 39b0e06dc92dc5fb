"""The command `entrepot retention`. `apply` deletes the tags and untagged manifests that no retention rule in the
settings keeps. `preview` shows what `apply` would delete, and which tags it would keep. In a repository without a rule,
all tags are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry.cli.options import USAGE_ERROR, ConfigOption, DataOption, fail
from registry.cli.output import human_size, plural, print_line
from registry.cli.upkeep.upkeep_run import JsonLinesOption, print_done, print_json_line

if TYPE_CHECKING:
    from registry.config import Settings
    from registry.upkeep.components import UpkeepComponents
    from registry.upkeep.retention.preview import PreviewLine, PreviewSummary
    from storage.names import RepositoryName
    from storage.upkeep.job_runner import Work

HELP = "Delete tags that no [[retention]] rule in the settings keeps, or show which tags these are."
app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)


@app.command(
    "preview",
    help="Show for each tag whether it would be kept, and why. Deletes nothing.",
    epilog="\b\nExamples:\n  entrepot retention preview --config entrepot.toml\n"
    "  entrepot retention preview team/app --json",
)
def preview(
    repository: Annotated[
        str | None, typer.Argument(metavar="[REPO]", help="Only this repository. [default: all with a rule]")
    ] = None,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonLinesOption = False,
) -> None:
    """Prints a line for each tag, a line for each untagged manifest that would be deleted, and the totals."""
    from registry.cli.upkeep.upkeep_run import with_upkeep

    repo = None if repository is None else _parse_repository(repository)

    async def run(upkeep: UpkeepComponents) -> PreviewSummary:
        _check_rules(upkeep.settings)
        return await upkeep.retention_preview.run(_print_preview_line_as_json if as_json else _print_preview_line, repo)

    summary = with_upkeep(config, data, run)
    if as_json:
        from dataclasses import asdict

        print_done(asdict(summary))
    else:
        _print_summary(summary)


@app.command(
    "apply",
    help="Delete the tags and untagged manifests that no rule keeps. Garbage collection frees their space later.",
    epilog="\b\nExample:\n  entrepot retention apply --config entrepot.toml",
)
def apply(
    confirmed: Annotated[
        bool, typer.Option("--yes", help="Needed if a rule has delete_all = true: such a rule keeps no tag at all.")
    ] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonLinesOption = False,
) -> None:
    """Runs the job `retention` in this process. Prints:

    - a line for each deleted tag or manifest;
    - a line for each tag that stays only because it was changed, pulled or made immutable during the job;
    - the totals."""
    from registry.cli.upkeep.upkeep_run import run_as_job

    def get_work(upkeep: UpkeepComponents) -> Work:
        rules = upkeep.settings.retention
        _check_rules(upkeep.settings)
        if not confirmed and any(rule.delete_all for rule in rules):
            patterns = ", ".join(pattern for rule in rules if rule.delete_all for pattern in rule.repositories)
            fail(
                f"a rule with `delete_all = true` deletes every tag of {patterns}; add `--yes` to confirm", USAGE_ERROR
            )
        return upkeep.work_by_kind["retention"]

    result = run_as_job(config, data, "retention", {}, get_work, as_json=as_json, on_step=_print_step)
    if as_json:
        print_done(result)
        return
    for warning in result["warnings"]:
        print_line(f"entrepot: warning: {warning}", err=True)
    print_line(
        f"deleted {plural(result['tags_deleted'], 'tag')} and {plural(result['manifests_deleted'], 'manifest')}; "
        f"kept {plural(result['tags_kept'], 'tag')}"
    )


def _check_rules(settings: Settings) -> None:
    """Ends the command if the settings have no rule."""
    if not settings.retention:
        fail('the settings have no rule, so all tags are kept; add [[retention]] with repositories = "team/**"')


def _parse_repository(text: str) -> RepositoryName:
    """Returns the name of a repository. Ends the command if it is not valid."""
    from storage.errors import NameInvalid
    from storage.names import RepositoryName

    try:
        return RepositoryName(text)
    except NameInvalid as error:
        fail(error.message, USAGE_ERROR)


def _print_preview_line(line: PreviewLine) -> None:
    name = f"{line.repository}@{line.digest}" if line.tag is None else f"{line.repository}:{line.tag}"
    print_line(f"{'keep  ' if line.is_kept else 'delete'} {name}  {line.reason} (rule {line.rule})")


def _print_preview_line_as_json(line: PreviewLine) -> None:
    print_json_line(_preview_line_json(line))


def _preview_line_json(line: PreviewLine) -> dict[str, Any]:
    """Returns the line of a preview as a JSON object. Times are in seconds since 1970."""
    return {
        "event": "would be kept" if line.is_kept else "would be deleted",
        "action": "keep" if line.is_kept else "delete",
        "repository": line.repository,
        "tag": line.tag,
        "digest": line.digest,
        "reason": line.reason,
        "rule": line.rule,
        "pushed": line.pushed,
        "pulled": line.pulled,
    }


def _print_step(step: Mapping[str, Any]) -> None:
    name = f"{step['repository']}:{step['tag']}" if "tag" in step else f"{step['repository']}@{step['digest']}"
    print_line(f"{'deleted' if step['action'] == 'delete' else 'kept   '} {name}  {step['reason']}")


def _print_summary(summary: PreviewSummary) -> None:
    """Prints the totals of a preview on stdout, and its warnings on stderr."""
    for warning in summary.warnings:
        print_line(f"entrepot: warning: {warning}", err=True)
    print_line(
        f"{plural(summary.tags_deleted, 'tag')} and {plural(summary.manifests_deleted, 'untagged manifest')} would be "
        f"deleted, and {plural(summary.tags_kept, 'tag')} kept"
    )
    if summary.bytes_freed:
        print_line(
            f"{human_size(summary.bytes_freed)} would be freed, once delete_untagged_after and gc.grace have passed"
        )
    if summary.bytes_left:
        print_line(
            f"{human_size(summary.bytes_left)} would stay, because manifests without a tag are kept; to delete them, "
            "set delete_untagged_after in the rule"
        )
