"""The command `entrepot scrub`: reads all stored content again to find bytes that the disk has changed or lost, and
shows the damaged content. One pass over all content is a *round*. The *quarantine* keeps the damaged bytes for
inspection."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry.cli.options import USAGE_ERROR, ConfigOption, DataOption, JsonOption, fail
from registry.cli.output import human_size, local_time, print_json, print_line, print_rows
from registry.cli.upkeep.upkeep_run import JsonLinesOption

if TYPE_CHECKING:
    from registry.admin.scrub_status import DamagedBlobResponse, QuarantinedResponse, ScrubStatus
    from registry.upkeep.components import UpkeepComponents
    from storage.upkeep.job_runner import Work

HELP = (
    "Read all stored content again, to find what the disk has changed or lost. Damaged content is not served any more; "
    "a mirror fetches it again, and a push of the image restores it. The exit code is 1 if something is damaged, "
    "or if the command has no permission to read some content. A server does the same on a schedule, see [scrub] in "
    "the settings."
)
EXAMPLES = "\b\nExamples:\n  entrepot scrub\n  entrepot scrub --rate 200MiB --json\n  entrepot scrub status"
MAX_SHOWN_DAMAGED = 1000
"""Largest number of damaged blobs that `status` shows."""
app = typer.Typer(help=HELP, epilog=EXAMPLES, invoke_without_command=True, rich_markup_mode=None)
quarantine = typer.Typer(
    help="Show and delete the damaged bytes that are kept.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(quarantine, name="quarantine")


@app.callback(epilog=EXAMPLES)
def scrub(
    context: typer.Context,
    rate: Annotated[
        str | None,
        typer.Option("--rate", metavar="SIZE", help="Bytes per second, such as 50MiB. [default: `rate` in [scrub]]"),
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Go on although twenty blobs in a row are damaged.")
    ] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonLinesOption = False,
) -> None:
    """Runs a round of scrub to its end: the round that an earlier job left unfinished, or else a new one. Prints what
    is damaged. Without `keep_going`, stops with an error after twenty damaged blobs in a row. If a subcommand is given,
    does nothing. If options stand before the subcommand, ends the command with exit code 2."""
    if context.invoked_subcommand is not None:
        if rate or keep_going or config or data or as_json:
            fail(f"write the options after the subcommand: entrepot scrub {context.invoked_subcommand} …", USAGE_ERROR)
        return
    from registry.cli.upkeep.upkeep_run import print_done, run_as_job
    from registry.upkeep.scrub_job import scrub_arguments, scrub_work
    from storage.upkeep.scrubber import SCRUB_KIND

    # Without a handler, Python would print logged warnings on stderr. `_print_step` already prints the same facts.
    for name in ("storage.damage", "registry.upkeep.scrub"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    arguments = scrub_arguments(_parse_rate(rate), keep_going=keep_going)

    def get_work(upkeep: UpkeepComponents) -> Work:
        return scrub_work(upkeep.settings.scrub, upkeep.store, upkeep.router)

    result = run_as_job(config, data, SCRUB_KIND, arguments, get_work, as_json=as_json, on_step=_print_step)
    if as_json:
        print_done(result)
    else:
        print_line(_summary(result), err=True)
    if result["damaged"] or result["still_damaged"] or result["unreadable"]:
        raise typer.Exit(1)


def _parse_rate(text: str | None) -> int | None:
    """Returns the number of bytes per second that a text such as `50MiB` states; None if `text` is None. Ends the
    command with exit code 2 if the text is not valid."""
    if text is None:
        return None
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        rate = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        rate = ByteSize(0)
    if rate < 1:
        fail(f"--rate: {text!r} is not a size; write it like 50MiB", USAGE_ERROR)
    return int(rate)


def _print_step(step: Mapping[str, Any]) -> None:
    """Prints one event of the round, such as a damaged blob, as a line."""
    match step["event"]:
        case "damaged":
            repositories = ", ".join(step["repositories"]) or "no repository"
            print_line(f"damaged {step['kind']} {step['digest']} of {repositories}: {step['reason']}")
        case "unreadable":
            print_line(f"not checked: {step['digest']}: {step['reason']}")
        case "healed":
            print_line(f"repaired: {step['digest']}, its right bytes are stored again")
        case "fetched":
            print_line(f"fetched again: {step['digest']} for {step['repository']}")
        case "not fetched":
            print_line(f"not fetched again: {step['digest']}: {step['reason']}")


def _summary(result: Mapping[str, Any]) -> str:
    """Returns the result of a round of scrub as one line."""
    read = f"{_count(result['blobs'], 'blob')} and {_count(result['manifests'], 'manifest')}"
    damage = f"found damaged: {result['damaged']}, fetched again: {result['fetched']}"
    damage += f", still damaged: {result['still_damaged']}"
    if result["unreadable"]:
        damage += f", not checked: {result['unreadable']}"
    return f"read {read} ({human_size(result['bytes'])}); {damage}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


@app.command(
    "status",
    help="Show the rounds of scrub, and the content that is damaged now.",
    epilog="\b\nExamples:\n  entrepot scrub status\n  entrepot scrub status --json",
)
def status(config: ConfigOption = None, data: DataOption = None, as_json: JsonOption = False) -> None:
    """Prints the rounds and the damaged content, as tables or as JSON."""
    from registry.admin.scrub_status import DamagedBlobResponse, ScrubStatus, read_scrub_status
    from registry.cli.upkeep.upkeep_run import with_upkeep

    class FullStatus(ScrubStatus):
        """The fields of the responses to `GET /scrub` and `GET /damaged` together."""

        damaged_blobs: list[DamagedBlobResponse]

    async def read(upkeep: UpkeepComponents) -> FullStatus:
        page = await upkeep.store.damage.damaged_blobs(None, MAX_SHOWN_DAMAGED)
        damaged = [DamagedBlobResponse.from_stored(blob) for blob in page.items]
        return FullStatus(**dict(await read_scrub_status(upkeep.store)), damaged_blobs=damaged)

    response = with_upkeep(config, data, read)
    if as_json:
        print_json(response)
        return
    _print_rounds(response)
    _print_damaged(response, response.damaged_blobs)


def _print_rounds(scrub_status: ScrubStatus) -> None:
    rows = [
        (
            local_time(scrub_round.started.timestamp()),
            "-" if scrub_round.ended is None else local_time(scrub_round.ended.timestamp()),
            f"{human_size(scrub_round.bytes)} of {human_size(scrub_round.total_bytes)}",
            str(scrub_round.blobs),
            str(scrub_round.manifests),
            str(scrub_round.damaged),
        )
        for scrub_round in scrub_status.rounds
    ]
    print_rows(("started", "ended", "read", "blobs", "manifests", "damaged"), rows, "no content was scrubbed yet")
    if scrub_status.job is not None:
        job = scrub_status.job
        print_line(f"entrepot: job {job.id} is {job.state}; `entrepot jobs stop {job.id}` stops it", err=True)


def _print_damaged(scrub_status: ScrubStatus, blobs: list[DamagedBlobResponse]) -> None:
    rows = [("blob", blob.digest, ", ".join(blob.repositories), blob.reason) for blob in blobs]
    rows += [
        ("manifest", manifest.digest, manifest.repository, manifest.reason)
        for manifest in scrub_status.damaged_manifests
    ]
    print_rows(("damaged", "digest", "repositories", "reason"), rows, "nothing is known to be damaged")


@quarantine.command(
    "list",
    help="List the damaged bytes that are kept for inspection, oldest first.",
    epilog="\b\nExample:\n  entrepot scrub quarantine list",
)
def list_quarantine(config: ConfigOption = None, data: DataOption = None, as_json: JsonOption = False) -> None:
    """Prints the entries of the quarantine, as a table or as JSON."""
    from registry.admin.scrub_status import read_quarantine
    from registry.cli.upkeep.upkeep_run import with_upkeep

    async def read(upkeep: UpkeepComponents) -> list[QuarantinedResponse]:
        return await read_quarantine(upkeep.store)

    entries = with_upkeep(config, data, read)
    if as_json:
        print_json(entries)
        return
    rows = [
        (
            entry.digest,
            human_size(entry.size),
            local_time(entry.since.timestamp()),
            "damaged" if entry.damaged else "repaired or deleted",
            entry.place,
        )
        for entry in entries
    ]
    print_rows(("digest", "size", "since", "blob state", "place"), rows, "the quarantine is empty")


@quarantine.command(
    "delete",
    help="Delete damaged bytes for good. The blob stays damaged until it is stored again.",
    epilog="\b\nExample:\n  entrepot scrub quarantine delete sha256:4f53cda1…",
)
def delete_quarantine(
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="The digest, as `scrub quarantine list` shows it.")],
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Deletes one entry of the quarantine."""
    from registry.admin.scrub_status import delete_quarantined
    from registry.cli.upkeep.upkeep_run import with_upkeep

    async def delete(upkeep: UpkeepComponents) -> None:
        await delete_quarantined(upkeep.store, digest)

    with_upkeep(config, data, delete)
    print_line(f"deleted the damaged bytes of {digest}", err=True)
