"""The command `entrepot tag`: shows the history of tags, and restores, moves and deletes tags. Modules that take long
to import are imported inside the functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.options import USAGE_ERROR, ConfigOption, DataOption, JsonOption, fail, one_line_errors
from registry.cli.output import plural, print_json, print_line, print_rows

if TYPE_CHECKING:
    from registry.upkeep.components import UpkeepComponents
    from storage.names import RepositoryName, Tag
    from storage.tag_history import TagChange, TagMove

HELP = "Show the history of tags, and move, restore or delete a tag. Works while a server is running."
app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)
TagArgument = Annotated[str, typer.Argument(metavar="REPO:TAG", help="The tag, such as team/app:v1.")]
ForceOption = Annotated[
    bool,
    typer.Option("--force", help="Change the tag even if it is immutable. The audit log records the use of --force."),
]
MoveJsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")]
_PAGE_SIZE = 1000
"""Largest number of changes that the command reads from the store in one call."""


@app.command(
    "history",
    help="Show every change of a tag, or of all tags of a repository, newest first.",
    epilog="""\b
Examples:
  entrepot tag history team/app:v1
  entrepot tag history team/app --limit 1000 --json

\b
The last column says whether a tag can point at the manifest of the line again:
  yes                  The manifest is stored.
  yes, it was deleted  The manifest was deleted, but the registry still keeps it.
  no                   Garbage collection has removed the manifest.""",
)
def history(
    reference: Annotated[str, typer.Argument(metavar="REPO[:TAG]", help="A tag, or a repository for all of its tags.")],
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, max=100_000, help="Show at most N lines.")] = 100,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prints the history as a table or as JSON."""
    from registry.admin.tag_models import TagChangeResponse
    from registry.cli.upkeep.upkeep_run import with_upkeep

    repo, tag = _parse_or_fail(reference)

    async def read(upkeep: UpkeepComponents) -> list[TagChange]:
        stored_repo = await upkeep.router.stored_name(repo)
        tag_changes: list[TagChange] = []
        while len(tag_changes) < limit:
            before = tag_changes[-1].id if tag_changes else None
            page = await upkeep.store.tag_history.changes(
                stored_repo, tag, before, min(limit - len(tag_changes), _PAGE_SIZE)
            )
            tag_changes += page.items
            if not page.more:
                break
        return tag_changes

    changes = with_upkeep(config, data, read)
    if as_json:
        print_json([TagChangeResponse.from_stored(change) for change in changes])
    else:
        columns = ("time", "tag", "points at", "actor", "address", "can be restored")
        empty_message = f"{repo} never had a tag" + ("" if tag is None else f" {tag}")
        print_rows(columns, [_row(change) for change in changes], empty_message)


def _row(change: TagChange) -> tuple[str, ...]:
    """Returns the cells of the table for one change."""
    from datetime import datetime

    availability_texts = {None: "-", "stored": "yes", "deleted": "yes, it was deleted", "gone": "no"}
    return (
        datetime.fromtimestamp(change.at).strftime("%Y-%m-%d %H:%M:%S"),
        change.tag,
        change.digest or "(deleted)",
        change.by.name,
        change.by.address or "-",
        availability_texts[change.availability],
    )


@app.command(
    "restore",
    help="Point a tag at what it pointed at before it was moved or deleted.",
    epilog="""\b
Examples:
  entrepot tag restore team/app:v1
  entrepot tag restore team/app:v1 --at 2h
  entrepot tag restore team/app:v1 --at 2026-11-28T09:30
  entrepot tag restore team/app:v1 --to sha256:9f86d08…

Without --to and --at, the tag points at what it pointed at before its last change. A deleted image is put back with its
platforms and its referrers, such as signatures, as long as the time in the setting gc.grace has not passed.""",
)
def restore(
    reference: TagArgument,
    to: Annotated[str | None, typer.Option("--to", metavar="DIGEST", help="The manifest to point at again.")] = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="TIME",
            help="Point at what the tag pointed at then: 2h (two hours ago), or a date and time.",
        ),
    ] = None,
    force: ForceOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: MoveJsonOption = False,
) -> None:
    """Restores the tag and prints what it points at now."""
    from registry.cli.data_owner import operator_actor
    from registry.cli.upkeep.upkeep_run import with_upkeep
    from storage.names import Digest
    from storage.upkeep.tag_changes import TagChanger

    repo, tag = _parse_tag_or_fail(reference)
    if to is not None and at is not None:
        fail("--to and --at contradict each other; give one of them", USAGE_ERROR)
    with one_line_errors():
        digest = None if to is None else Digest(to)
    unix_time = None if at is None else _parse_time_or_fail(at)

    async def work(upkeep: UpkeepComponents) -> TagMove:
        hosted_repo = await upkeep.router.require_hosted(repo)
        changer = TagChanger(upkeep.store.tag_history, upkeep.store.immutable_tags)
        return await changer.restore(hosted_repo, tag, to=digest, at=unix_time, by=operator_actor(), force=force)

    _print_move(repo, with_upkeep(config, data, work), as_json)


@app.command(
    "move",
    help="Point a tag at a manifest of its repository. Creates the tag if it does not exist.",
    epilog="""\b
Examples:
  entrepot tag move team/app:stable v1.4
  entrepot tag move team/app:v1 sha256:9f86d08… --force""",
)
def move(
    reference: TagArgument,
    target: Annotated[
        str, typer.Argument(metavar="DIGEST|TAG", help="The manifest: its digest, or another tag of the repository.")
    ],
    force: ForceOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: MoveJsonOption = False,
) -> None:
    """Moves the tag and prints what it points at now."""
    from registry.cli.data_owner import operator_actor
    from registry.cli.upkeep.upkeep_run import with_upkeep
    from storage.names import as_reference
    from storage.upkeep.tag_changes import TagChanger

    repo, tag = _parse_tag_or_fail(reference)
    with one_line_errors():
        target_reference = as_reference(target)

    async def work(upkeep: UpkeepComponents) -> TagMove:
        hosted_repo = await upkeep.router.require_hosted(repo)
        changer = TagChanger(upkeep.store.tag_history, upkeep.store.immutable_tags)
        return await changer.move(hosted_repo, tag, target_reference, by=operator_actor(), force=force)

    _print_move(repo, with_upkeep(config, data, work), as_json)


@app.command(
    "delete",
    help="Delete a tag. Its manifest stays, and `tag restore` brings the tag back.",
    epilog="\b\nExample:\n  entrepot tag delete team/app:v1",
)
def delete(
    reference: TagArgument, force: ForceOption = False, config: ConfigOption = None, data: DataOption = None
) -> None:
    """Deletes the tag."""
    from registry.cli.data_owner import operator_actor
    from registry.cli.upkeep.upkeep_run import with_upkeep
    from storage.upkeep.tag_changes import TagChanger

    repo, tag = _parse_tag_or_fail(reference)

    async def work(upkeep: UpkeepComponents) -> None:
        hosted_repo = await upkeep.router.require_hosted(repo)
        changer = TagChanger(upkeep.store.tag_history, upkeep.store.immutable_tags)
        await changer.delete(hosted_repo, tag, by=operator_actor(), force=force)

    with_upkeep(config, data, work)
    print_line(f"deleted {repo}:{tag}; its manifest stays")


def _print_move(repo: RepositoryName, move: TagMove, as_json: bool) -> None:
    """Prints what the tag points at now, and what it pointed at before."""
    from registry.admin.tag_models import TagMoveResponse
    from registry.cli.upkeep.upkeep_run import print_json_line

    if as_json:
        print_json_line(TagMoveResponse.from_stored(repo, move).model_dump(mode="json"))
        return
    if move.previous == move.digest:
        text = f"{repo}:{move.tag} points at {move.digest} already"
    elif move.previous is None:
        text = f"{repo}:{move.tag} points at {move.digest} now; before, there was no such tag"
    else:
        text = f"{repo}:{move.tag} points at {move.digest} now; before, it pointed at {move.previous}"
    print_line(text + (f"; put back {plural(len(move.restored), 'deleted manifest')}" if move.restored else ""))


def _parse_or_fail(text: str) -> tuple[RepositoryName, Tag | None]:
    """Parses `REPO[:TAG]`. Returns the repository and the tag; None if there is no tag. Ends the command if `text` has
    another form."""
    from storage.names import RepositoryName, Tag

    if "@" in text:
        fail(f"{text} has a digest; give a tag instead, such as team/app:v1", USAGE_ERROR)
    name, colon, tag = text.rpartition(":")
    with one_line_errors():
        if not colon or "/" in tag:  # a colon before a slash would separate a host from a port
            return RepositoryName(text), None
        return RepositoryName(name), Tag(tag)


def _parse_tag_or_fail(text: str) -> tuple[RepositoryName, Tag]:
    """Parses `REPO:TAG`. Returns the repository and the tag. Ends the command if `text` has another form."""
    repo, tag = _parse_or_fail(text)
    if tag is None:
        fail(f"{text} names no tag; write {text}:TAG", USAGE_ERROR)
    return repo, tag


def _parse_time_or_fail(text: str) -> float:
    """Returns the time of --at in seconds since 1970. Ends the command if `text` is neither of these:

    - A duration before now: `2h` means two hours ago.
    - A date and time, in local time if it has no time zone. If it has no fraction of a second, it means the end of the
      second, because `tag history` shows whole seconds."""
    import time
    from datetime import datetime

    from registry.config import parse_duration

    try:
        at = datetime.fromisoformat(text)
        return at.timestamp() + (0 if at.microsecond else 0.999)
    except (ValueError, OverflowError, OSError):
        pass
    try:
        seconds = parse_duration(text)
    except ValueError:
        fail(f"--at: {text!r} is neither a time like 2026-11-28T09:30 nor a duration like 2h", USAGE_ERROR)
    assert isinstance(seconds, int | float)
    return time.time() - seconds
