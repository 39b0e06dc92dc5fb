"""`entrepot audit`."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.accounts.account_admin import JsonOption, administer, print_json, print_rows
from registry.cli.options import ConfigOption, DataOption, one_line_errors

if TYPE_CHECKING:
    from registry.auth.administration import Administration
    from storage.access import AuditEntry
    from storage.content import Actor

HELP = "Show who did what, newest first: changes of content, accounts and rights, logins, denials."
EXAMPLES = """\b
Examples:
  entrepot audit
  entrepot audit --since 24h --outcome denied
  entrepot audit --actor alice --action tag.delete --limit 1000 --json
  entrepot audit --target team/app

All conditions must hold. Logins and denials come a second late; equal ones of a moment are one line with a count."""


def audit(
    actor: Annotated[str | None, typer.Option("--actor", metavar="NAME", help="Who did it.")] = None,
    action: Annotated[str | None, typer.Option("--action", metavar="ACTION", help="What was done.")] = None,
    target: Annotated[str | None, typer.Option("--target", metavar="NAME", help="What it was done to.")] = None,
    outcome: Annotated[str | None, typer.Option("--outcome", metavar="OUTCOME", help="ok, denied or failed.")] = None,
    since: Annotated[str | None, typer.Option("--since", metavar="TIME", help="Not longer ago, such as 24h.")] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, max=100_000, help="Lines at the most.")] = 100,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    from registry.admin import models
    from storage.access import AuditQuery

    with one_line_errors():
        after = None if since is None else time.time() - models.parse_seconds(since)
    query = AuditQuery(actor=actor, action=action, target=target, outcome=outcome, since=after)

    async def work(administration: Administration, _: Actor) -> list[AuditEntry]:
        return list(administration.audit(query, limit).items)

    entries = administer(config, data, work)
    if as_json:
        print_json([models.Line.of(entry) for entry in entries])
        return
    columns = ("time", "outcome", "actor", "action", "target", "address", "detail")
    print_rows(columns, [_row(entry) for entry in entries], "no line of the audit log is like that")


def _row(entry: AuditEntry) -> tuple[str, ...]:
    detail = json.dumps(dict(entry.detail), ensure_ascii=False) if entry.detail else ""
    count = f"{entry.count} times" if entry.count > 1 else ""
    when = datetime.fromtimestamp(entry.at).strftime("%Y-%m-%d %H:%M:%S")
    shown = " ".join(filter(None, (count, detail)))
    return when, entry.outcome, entry.actor, entry.action, entry.target, entry.address or "-", shown
