"""The command `entrepot events`: shows events (things that happened to the content, such as pushes and pulls), and the
pending and failed *deliveries* of events to webhooks. A *dead letter* is a failed delivery that the server no longer
retries by itself. `entrepot events retry` retries dead letters."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.options import MAX_ID, USAGE_ERROR, ConfigOption, DataOption, JsonOption, fail
from registry.cli.output import local_time, plural, print_json, print_json_document, print_line, print_rows

if TYPE_CHECKING:
    from registry.upkeep.components import UpkeepComponents
    from storage.outbox import Delivery, Event

HELP = "Show what happened to the content, and which events webhooks have not received."
app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)
IDLE_SECONDS = 3600.0
"""How long `follow` (`registry.events.event_feed`) waits for an event before it yields an empty page. `tail` ignores
empty pages."""
COLUMNS = ("event", "time", "action", "what", "actor", "detail")
EVENTS_NOT_KEPT = 'this registry keeps no events; set events.keep in its settings, such as keep = "24h"'

ActionOption = Annotated[
    str | None, typer.Option("--action", metavar="ACTION", help="Only events with this action, such as push.")
]
RepositoryOption = Annotated[
    str | None, typer.Option("--repository", metavar="NAME", help="Only events of this repository.")
]
WebhookOption = Annotated[str | None, typer.Option("--webhook", metavar="NAME", help="Only this webhook.")]


@app.command(
    "tail",
    help="Print events as they happen, until Ctrl-C. Works beside a running server.",
    epilog="\b\nExamples:\n  entrepot events tail\n  entrepot events tail --action push --json\n"
    "  entrepot events tail --after 0",
)
def tail(
    action: ActionOption = None,
    repository: RepositoryOption = None,
    after: Annotated[
        int | None,
        typer.Option(
            "--after", metavar="N", min=0, max=MAX_ID, help="Begin after event N. [default: with the next event]"
        ),
    ] = None,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
) -> None:
    """Prints one line for each event."""
    from registry.cli.upkeep.upkeep_run import with_upkeep

    _check_action(action)

    async def print_events(upkeep: UpkeepComponents) -> None:
        from registry.events.event_feed import follow
        from storage.outbox import EventAction

        if not upkeep.settings.events.keep:
            fail(EVENTS_NOT_KEPT)
        outbox, version = upkeep.store.outbox, upkeep.store.metadata.version
        start = await outbox.newest_number() if after is None else after
        event_action = None if action is None else EventAction(action)
        events = follow(outbox, version, start, idle_seconds=IDLE_SECONDS, action=event_action, repository=repository)
        async with aclosing(events) as pages:
            async for page in pages:
                for event in page:
                    _print_event(event, as_json=as_json)

    with_upkeep(config, data, print_events)


@app.command(
    "list",
    help="List events, newest first. With --pending, --dead or --webhook: events that webhooks have not received.",
    epilog="\b\nExamples:\n  entrepot events list\n  entrepot events list --repository team/app --json\n"
    "  entrepot events list --dead\n  entrepot events list --pending --webhook ci",
)
def list_events(
    action: ActionOption = None,
    repository: RepositoryOption = None,
    dead: Annotated[
        bool, typer.Option("--dead", help="Only dead letters: events that the server no longer tries to deliver.")
    ] = False,
    pending: Annotated[bool, typer.Option("--pending", help="Only events that are still to be delivered.")] = False,
    webhook: WebhookOption = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, max=100_000, help="Show at most N.")] = 50,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prints events, or deliveries, as a table or as JSON."""
    _check_action(action)
    if dead or pending or webhook is not None:
        if dead and pending:
            fail("--dead and --pending exclude each other", USAGE_ERROR)
        if action is not None or repository is not None:
            fail("--dead, --pending and --webhook cannot be combined with --action or --repository", USAGE_ERROR)
        _list_deliveries(config, data, webhook, limit, only_dead=dead, only_pending=pending, as_json=as_json)
        return
    from registry.admin.event_models import EventResponse
    from registry.cli.upkeep.upkeep_run import with_upkeep
    from storage.outbox import EventAction

    async def read(upkeep: UpkeepComponents) -> list[Event]:
        if not upkeep.settings.events.keep:
            fail(f"{EVENTS_NOT_KEPT}. `entrepot events list --pending` shows the events that wait for delivery")
        event_action = None if action is None else EventAction(action)
        events: list[Event] = []
        position, is_last = None, False
        while len(events) < limit and not is_last:
            page = await upkeep.store.outbox.before(
                position, limit - len(events), action=event_action, repository=repository
            )
            events += page.events
            position, is_last = page.position, page.is_last
        return events

    events = with_upkeep(config, data, read)
    if as_json:
        print_json([EventResponse.from_stored(event) for event in events])
    else:
        print_rows(COLUMNS, [_cells(event) for event in events], "there are no such events")


def _list_deliveries(
    config: Path | None,
    data: str | None,
    webhook: str | None,
    limit: int,
    *,
    only_dead: bool,
    only_pending: bool,
    as_json: bool,
) -> None:
    """Prints the pending deliveries and the dead letters. `only_pending` and `only_dead` restrict the output to one of
    these kinds. `webhook`: the name of the webhook; None: all webhooks. `limit`: the largest number of deliveries."""
    from registry.admin.event_models import DeliveryResponse
    from registry.cli.upkeep.upkeep_run import with_upkeep

    async def read(upkeep: UpkeepComponents) -> list[Delivery]:
        outbox = upkeep.store.outbox
        return list(await outbox.deliveries(webhook, None, limit, only_dead=only_dead, only_pending=only_pending))

    deliveries = with_upkeep(config, data, read)
    if as_json:
        print_json([DeliveryResponse.from_stored(delivery) for delivery in deliveries])
        return
    rows = [(delivery.webhook, *_cells(delivery.event)[:4], _state(delivery)) for delivery in deliveries]
    print_rows(("webhook", *COLUMNS[:4], "state"), rows, "there are no such deliveries")


@app.command(
    "retry",
    help="Send dead letters again: those of one event, of one webhook, or all.",
    epilog="\b\nExamples:\n  entrepot events retry 1234\n  entrepot events retry --webhook ci\n"
    "  entrepot events retry --all",
)
def retry(
    event: Annotated[
        int | None,
        typer.Argument(
            metavar="[EVENT]", min=1, max=MAX_ID, help="The number of the event, as `events list` shows it."
        ),
    ] = None,
    webhook: WebhookOption = None,
    all_webhooks: Annotated[bool, typer.Option("--all", help="All dead letters of all webhooks.")] = False,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Puts dead letters back among the pending deliveries. The server tries to send them within five minutes,
    usually at once."""
    from registry.cli.upkeep.upkeep_run import with_upkeep

    if event is None and webhook is None and not all_webhooks:
        fail("name an event or a webhook, or pass --all", USAGE_ERROR)

    async def change(upkeep: UpkeepComponents) -> int:
        return await upkeep.store.outbox.retry(webhook, event)

    count = with_upkeep(config, data, change)
    if not count:
        fail("there is no such dead letter")
    print_line(f"{plural(count, 'event')} will be sent again", err=True)


def _check_action(action: str | None) -> None:
    """Ends the command with a usage error if `action` is not the name of an action. None is valid."""
    from storage.outbox import EventAction

    if action is not None and action not in set(EventAction):
        fail(f"there is no action {action}; the actions are {', '.join(EventAction)}", USAGE_ERROR)


def _print_event(event: Event, *, as_json: bool) -> None:
    """Prints an event as one line of text or JSON."""
    from registry.admin.event_models import EventResponse

    if as_json:
        print_json_document(EventResponse.from_stored(event).model_dump_json())
        return
    number, time, action, what, actor, detail = _cells(event)
    print_line(f"{number:>8}  {time}  {action:<10}  {what}  by {actor}{'  ' + detail if detail else ''}")


def _cells(event: Event) -> tuple[str, ...]:
    """Returns the cells of an event for `COLUMNS`."""
    facts = event.content  # the facts of the event: what happened, to what, and who caused it
    what = facts.repository + (f":{facts.tag}" if facts.tag is not None else "")
    if facts.tag is None and facts.digest is not None:
        what += f"@{facts.digest}"
    details = [facts.reason]
    if facts.tag is not None and facts.digest is not None:
        details.append(_short(facts.digest))
    if facts.previous is not None:
        details.append(f"before: {_short(facts.previous)}")
    detail = ", ".join(filter(None, details))
    return str(event.number), local_time(facts.at), str(facts.action), what, facts.by.name, detail


def _short(digest: str) -> str:
    """Shortens a digest to its algorithm and the first 12 hexadecimal digits."""
    return digest[: digest.index(":") + 13]


def _state(delivery: Delivery) -> str:
    """Returns the state of a delivery, for the column `state`."""
    if delivery.dead is not None:  # `dead` is the time at which the server gave up
        return f"given up at {local_time(delivery.dead)}: {delivery.error}"
    return f"waits; the last attempt failed: {delivery.error}" if delivery.error else "waits"
