"""The command `entrepot quota`: shows how much of each quota in the settings is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from registry.cli.options import ConfigOption, DataOption, JsonOption
from registry.cli.output import human_size, print_json, print_rows

if TYPE_CHECKING:
    from registry.upkeep.components import UpkeepComponents
    from storage.usage import ScopeUsage

HELP = "Show how much of each quota in the settings is used."
app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)


@app.command(
    "list",
    help="List the quotas, and what the repositories below each prefix use.",
    epilog="\b\nExamples:\n  entrepot quota list\n  entrepot quota list --json",
)
def list_quotas(config: ConfigOption = None, data: DataOption = None, as_json: JsonOption = False) -> None:
    """Prints the quotas, as a table or as JSON."""
    from registry.admin.cache_models import QuotaResponse, has_quota
    from registry.cli.upkeep.upkeep_run import with_upkeep

    async def read_quotas(upkeep: UpkeepComponents) -> list[ScopeUsage]:
        return [usage for usage in await upkeep.store.usage.scopes() if has_quota(usage)]

    quotas = [QuotaResponse.from_usage(usage) for usage in with_upkeep(config, data, read_quotas)]
    if as_json:
        print_json(quotas)
        return
    rows = [
        (
            quota.prefix or "(all)",
            _usage_text(human_size(quota.size), None if quota.max_size is None else human_size(quota.max_size)),
            _usage_text(str(quota.tags), None if quota.max_tags is None else str(quota.max_tags)),
            "in effect" if quota.complete else "still counting",
        )
        for quota in quotas
    ]
    print_rows(("prefix", "size", "tags", "state"), rows, "there is no [[quota]] in the settings of the server")


def _usage_text(used: str, limit: str | None) -> str:
    """Returns text such as `3 of 10`, or only `3` if there is no limit."""
    return used if limit is None else f"{used} of {limit}"
