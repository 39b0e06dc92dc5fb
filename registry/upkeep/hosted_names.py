"""Finds the repositories whose tags people may change here: those that clients push to (`hosted_repository`)."""

from __future__ import annotations

from registry.router import Router
from storage.errors import NameUnknown, Unsupported
from storage.names import RepositoryName


async def hosted_repository(router: Router, repo: RepositoryName) -> RepositoryName:
    """Returns the stored name of the repository, if clients have pushed to it. Raises Unsupported for the name of a
    mirrored repository, NameUnknown if nothing was ever pushed to the name."""
    if (upstream := router.naming.upstream_of(repo)) is not None:
        raise Unsupported(f"{repo} is mirrored from {upstream}, and its tags follow that registry")
    destination = await router.locate(repo)
    if destination.upstream is not None:  # the name leads to the default upstream only until its first push
        raise NameUnknown(f"nothing was ever pushed to {repo}")
    return destination.repo
