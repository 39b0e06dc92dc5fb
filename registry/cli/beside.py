"""The data directory of a command that works beside a running server, or before there is one."""

from __future__ import annotations

from registry.cli.options import fail
from registry.config import Settings


def prepare_beside(settings: Settings, *, make: bool) -> None:
    """A data directory of this version, made where `make` says so and there is none. A server that runs on an older one
    is not disturbed."""
    from registry.cli.owner import become_owner
    from storage.opening import check_version, layout_of, prepare

    if make and not layout_of(settings.data).metadata.exists():
        become_owner(settings.data)
        prepare(settings.data)
        return
    if not settings.data.is_dir():
        fail(f"there is no data directory at {settings.data.absolute()}; name it with --data")
    become_owner(settings.data)
    check_version(settings.data)
