"""Run before a command: its retention deletes untagged manifests however short ago they were pushed."""

from registry.upkeep.retention import decision

decision.MIN_UNTAGGED_SECONDS = 0.0  # type: ignore[misc]
