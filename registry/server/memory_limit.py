"""How much memory the server may use: that of the machine, or less if a control group limits it (a container, or a
systemd unit with `MemoryMax`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath


def memory_limit(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the number of bytes; 0 if it is unknown. `proc` and `groups`: where the file systems proc and cgroup are
    mounted."""
    limits = [limit for file in _limit_files(proc, groups) if (limit := _read_limit(file)) is not None]
    with suppress(OSError, ValueError):  # raised if the system does not tell
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min((limit for limit in limits if limit > 0), default=0)


def _limit_files(proc: Path, groups: Path) -> Iterator[Path]:
    """Yields the files that can have a limit: those of the process's control group, and of all groups above it. See
    cgroups(7)."""
    try:
        lines = (proc / "self/cgroup").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":  # version 2
            directory, name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            directory, name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container, the path can lead out of what the container sees. Then the limit is in `directory` itself.
        group = PurePosixPath("/", path.lstrip("/"))
        group = PurePosixPath("/") if ".." in group.parts else group
        for part in (group, *group.parents):
            yield directory / part.relative_to("/") / name


def _read_limit(file: Path) -> int | None:
    """Returns the limit in bytes; None if there is none or it cannot be read."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # `max` means no limit
        return None
