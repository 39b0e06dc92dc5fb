"""The setting `[scrub]`: how often and how fast all stored content is read again."""

from __future__ import annotations

from pydantic import ByteSize, Field

from registry.config.field_types import MIB, Duration, SettingsGroup


class ScrubSettings(SettingsGroup):
    """Scrub, which reads all stored content again to find out whether the disk has changed or lost any of it. Damaged
    content is not served any more. What a mirror can fetch again, it fetches; the rest waits for a push."""

    every: Duration = Field(
        default=30 * 86400.0,
        description="Time between the end of a round and the start of the next one. `0` means that the server starts "
        "no rounds",
    )
    rate: ByteSize = Field(default=ByteSize(20 * MIB), gt=0, description="How many bytes are read per second at most")
    quarantine_max: ByteSize = Field(
        default=ByteSize(1024 * MIB),
        ge=0,
        description="How many damaged bytes are kept in the data directory's folder `quarantine`, for a look at them; "
        "the oldest go first",
    )
