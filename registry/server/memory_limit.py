"""Finds out how much memory the server may use (`memory_limit`). A control group can set a limit, for example that of a
container, or of a systemd unit with `MemoryMax`. Without a limit, the server may use all memory of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath


def memory_limit(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Returns the number of bytes of memory that the server may use; 0 if it is unknown. `proc` and `groups`: the
    directories at which the file systems proc and cgroup are mounted."""
    limits = [limit for file in _limit_files(proc, groups) if (limit := _read_limit(file)) is not None]
    with suppress(OSError, ValueError):  # the system does not say how much memory it has
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min((limit for limit in limits if limit > 0), default=0)


def _limit_files(proc: Path, groups: Path) -> Iterator[Path]:
    """Yields the paths of the files that can contain a limit, for the process's control group and all groups above it
    (cgroups(7)). A file need not exist."""
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
        # In a container, the path can begin with `..`: the process's group is then outside of the groups that the
        # container sees. In this case, the limit is in the file `directory / name`.
        group = PurePosixPath("/", path.lstrip("/"))
        group = PurePosixPath("/") if ".." in group.parts else group
        for group_or_parent in (group, *group.parents):
            yield directory / group_or_parent.relative_to("/") / name


def _read_limit(file: Path) -> int | None:
    """Returns the limit in bytes; None if the file has no limit or cannot be read."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # ValueError: the content is `max`, which means no limit
        return None
