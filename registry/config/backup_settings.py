"""The settings `[backup]`: where backups are made, and how many are kept."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from registry.config.field_types import SettingsGroup


class BackupSettings(SettingsGroup):
    """Backups, which `entrepot backup` and the API make while the registry serves."""

    target: Path | None = Field(
        default=None,
        description="Directory of the backups. It has its own copy of the accounts and keys, so only its owner may "
        "read it",
    )
    keep: int | None = Field(
        default=None,
        ge=1,
        description="How many backups are kept in the directory; older ones are removed. Default: all",
    )
