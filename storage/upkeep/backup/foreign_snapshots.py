"""Finds the snapshots of other registries in a directory of backups (`find_foreign`). A *snapshot* is the copy of a
registry that one backup has added to the directory.

Two registries can use one directory: somebody names the wrong one, or a server has begun a new registry at a mount
point whose disk is not mounted. A backup must then not remove the snapshots of the other registry as old ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from storage.backups import BackupFailed, Snapshots
from storage.upkeep.backup.backup_directory import BackupDirectory, SnapshotManifest


def find_foreign(
    snapshots: Snapshots, directory: BackupDirectory, name: str, stored: Sequence[SnapshotManifest]
) -> list[SnapshotManifest]:
    """Returns those of the `stored` snapshots that are of another registry than the snapshot `name`. A snapshot whose
    registry is unknown or cannot be read does not count. Blocks."""
    own = _instance_id(snapshots, directory, name)
    return [other for other in stored if own and _instance_id(snapshots, directory, other.name) not in ("", own)]


def _instance_id(snapshots: Snapshots, directory: BackupDirectory, name: str) -> str:
    """Returns the id of the registry of a snapshot (`DatabaseSnapshot.instance_id`); empty if it cannot be read."""
    with suppress(BackupFailed), snapshots.open(directory.database(name)) as snapshot:
        return snapshot.instance_id
    return ""


def foreign_warning(directory: BackupDirectory, foreign: Sequence[SnapshotManifest], registry: str) -> str:
    """Returns the text of a warning about `foreign` snapshots. `registry`: the words after "of another registry
    than", such as `this one`."""
    number = len(foreign)
    return (
        f"{directory.root} has {number} {'backup' if number == 1 else 'backups'} of another registry than {registry}, "
        f"such as {foreign[-1].name}; give each registry a directory of its own"
    )
