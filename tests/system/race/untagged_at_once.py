"""Run before a command: retention then deletes untagged manifests however recently they were pushed."""

from registry.upkeep.retention import decision

decision.MIN_UNTAGGED_SECONDS = 0.0  # type: ignore[misc]
