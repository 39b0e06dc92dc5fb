"""The command `entrepot audit`: prints entries of the audit log."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Annotated

import typer

from registry.cli.accounts.account_admin import print_list
from registry.cli.options import ConfigOption, DataOption, JsonOption, one_line_errors
from storage.access import AuditEntry, AuditQuery

HELP = (
    "Show who did what, newest first. The audit log has logins, refused requests, and changes of content, accounts and "
    "rights."
)
EXAMPLES = """\b
Examples:
  entrepot audit
  entrepot audit --since 24h --outcome denied
  entrepot audit --since 48h --until 24h
  entrepot audit --actor alice --action tag.delete --limit 1000 --json
  entrepot audit --target team/app

The command shows the lines that meet all conditions. Logins and refused requests appear about one second late. Equal
logins and refused requests within this second share one line, which shows their number."""


def audit(
    actor: Annotated[str | None, typer.Option("--actor", metavar="NAME", help="Who acted, such as alice.")] = None,
    action: Annotated[
        str | None, typer.Option("--action", metavar="ACTION", help="What was done, such as tag.delete.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", metavar="NAME", help="What the action concerns, such as team/app.")
    ] = None,
    outcome: Annotated[
        str | None, typer.Option("--outcome", metavar="OUTCOME", help="The result: ok, denied or failed.")
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="Only what was done in the last TIME, such as 24h.")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", metavar="TIME", help="Only what was done more than TIME ago, such as 24h.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, max=100_000, help="Show at most N lines.")] = 100,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prints the entries of the audit log that meet all given conditions, newest first. Ends the command with an error
    message if `since` or `until` is not a duration such as `24h`."""
    from registry.admin import models

    with one_line_errors():
        ages = [None if text is None else models.parse_seconds(text) for text in (since, until)]
    now = time.time()
    earliest, latest = (None if age is None else now - age for age in ages)
    query = AuditQuery(actor=actor, action=action, target=target, outcome=outcome, since=earliest, until=latest)
    print_list(
        config,
        data,
        as_json,
        read=lambda administration: administration.audit_entries(query, limit).items,
        to_model=models.AuditEntryResponse.from_stored,
        columns={
            "time": lambda entry: datetime.fromtimestamp(entry.at).strftime("%Y-%m-%d %H:%M:%S"),
            "outcome": lambda entry: entry.outcome,
            "actor": lambda entry: entry.actor,
            "action": lambda entry: entry.action,
            "target": lambda entry: entry.target,
            "address": lambda entry: entry.address or "-",
            "detail": _detail_text,
        },
        empty_message="no line of the audit log meets all conditions",
    )


def _detail_text(entry: AuditEntry) -> str:
    """Returns the details of the entry as JSON, or an empty text if the entry has no details. If the entry stands for
    several equal events, the text begins with the number of these events."""
    count = f"{entry.count} times" if entry.count > 1 else ""
    detail = json.dumps(dict(entry.detail), ensure_ascii=False) if entry.detail else ""
    return " ".join(filter(None, (count, detail)))
