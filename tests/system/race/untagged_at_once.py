"""Runs in the process of an `entrepot` command before the command itself. With it, retention deletes untagged manifests
however recently they were pushed, so that a short load test can observe the deletion."""

from registry.upkeep.retention import decision

decision.MIN_UNTAGGED_SECONDS = 0.0  # type: ignore[misc]
