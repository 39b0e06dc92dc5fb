"""Maps the name that a client asks for to the stored names that it may mean. Pure: looks at no store.

- A name below an upstream's (`ghcr.io/org/app`) belongs to that upstream.
- With a default upstream, `library/*` belongs to it as well.
- Any other name without a host may mean a repository hosted here or one of the default upstream, unless it matches a
  pattern of `[hosted] prefixes`; `registry.router` decides, by what was pushed.
- Every other name is hosted here, also one that begins with the host of a registry that is not mirrored.

Mirrored content has one stored name, however a client asks for it: `ubuntu` on Docker Hub is stored as
`docker.io/library/ubuntu`.
"""

from __future__ import annotations

from collections.abc import Iterable

from registry.config import DOCKER_HUB, HUB_LIBRARY, Settings
from storage.errors import NameInvalid, NameUnknown
from storage.names import MAX_NAME_LENGTH, RepositoryName
from storage.patterns import NamePattern


class NamingRules:
    """The rules for one set of mirrors. `upstreams`: the names of those that are mirrored, in the order of the
    settings. `default`: the one that names without a host may mean; None: there is none."""

    def __init__(
        self, upstreams: Iterable[str] = (), *, default: str | None = None, prefixes: Iterable[str] = ()
    ) -> None:
        """`prefixes`: patterns of names that are always hosted here. Raises ValueError for a default that is not
        mirrored."""
        self.upstreams = tuple(upstreams)
        self.default = default
        if default is not None and default not in self.upstreams:
            raise ValueError(f"the default upstream {default} is not mirrored")
        self._names = frozenset(self.upstreams)
        self._hosted = [NamePattern(prefix) for prefix in prefixes]

    @classmethod
    def from_settings(cls, settings: Settings) -> NamingRules:
        upstreams = [upstream.name for upstream in settings.upstream]
        return cls(upstreams, default=settings.default_upstream, prefixes=settings.hosted.prefixes)

    def upstream_of(self, name: str) -> str | None:
        """Returns the upstream that a name belongs to, whatever is pushed here; None: it can be hosted here."""
        first, slash, _ = name.partition("/")
        if first in self._names:
            return first
        return self.default if first == HUB_LIBRARY and slash else None

    def mirrored_name(self, repo: RepositoryName, upstream: str) -> RepositoryName:
        """Returns the stored name of `repo` as content of `upstream`. Raises NameUnknown for the upstream's bare
        name, NameInvalid for one that is too long."""
        first, slash, rest = repo.partition("/")
        if first != upstream:
            rest = repo
        elif not slash:
            raise NameUnknown(f"{upstream} is mirrored here and is no repository itself; pull {upstream}/NAME")
        if upstream == DOCKER_HUB and "/" not in rest:
            rest = f"{HUB_LIBRARY}/{rest}"
        return RepositoryName(f"{upstream}/{rest}")

    def default_name(self, repo: RepositoryName) -> RepositoryName | None:
        """Returns the stored name of `repo` as content of the default upstream. None: it cannot be of that one, since
        it belongs to an upstream, is always hosted here, begins with another registry's host, or would be too long."""
        first, slash, _ = repo.partition("/")
        if self.default is None or (slash and ("." in first or first == "localhost")):
            return None
        if len(repo) + len(self.default) + len(HUB_LIBRARY) + 2 > MAX_NAME_LENGTH:
            return None
        if self.upstream_of(repo) is not None or any(pattern.matches(repo) for pattern in self._hosted):
            return None
        return self.mirrored_name(self.below(self.default, repo), self.default)

    def candidates(self, repo: RepositoryName) -> tuple[RepositoryName, ...]:
        """Returns the stored names that a read of `repo` may lead to: one, or itself and its name at the default
        upstream. The bare name of an upstream leads nowhere and is returned as it is."""
        upstream = self.upstream_of(repo)
        if upstream is not None:
            return (repo if repo == upstream else self.mirrored_name(repo, upstream),)
        default = self.default_name(repo)
        return (repo,) if default is None else (repo, default)

    def below(self, upstream: str, repo: RepositoryName) -> RepositoryName:
        """Returns `repo` below an upstream's name; one that is below it already is returned as it is."""
        return repo if repo.startswith(f"{upstream}/") else RepositoryName(f"{upstream}/{repo}")

    def possible_names(self, name: str) -> tuple[RepositoryName, ...]:
        """Returns the stored names of mirrored content that a request for `name` may lead to, whichever upstream the
        request names by its host or by `ns`."""
        found = []
        for upstream in self.upstreams:
            try:
                found.append(self.mirrored_name(self.below(upstream, RepositoryName(name)), upstream))
            except NameInvalid:  # too long below that upstream
                continue
        return tuple(found)
