"""`NamingRules`: maps the repository name in a request to the stored names that it may mean.

An *upstream* is another registry that this one mirrors. A *hosted* repository is one whose content is pushed here. The
*stored name* of a repository is its name in the store. Mirrored content has one stored name, which begins with the
upstream's name, for all names that clients use: `ubuntu` of Docker Hub is stored as `docker.io/library/ubuntu`.

- A name that begins with an upstream's name, such as `ghcr.io/org/app`, belongs to that upstream.
- If the settings name a default upstream, `library/*` belongs to it as well.
- With a default upstream, any other name without a host may mean a hosted repository or one of that upstream.
  `registry.router` decides between them by the pushes so far. A name that matches a pattern in `[hosted] prefixes`
  always means the hosted one.
- Every other name is hosted, even if it begins with the host of a registry that is not mirrored.

The rules look only at names, not at what the store contains.
"""

from __future__ import annotations

from collections.abc import Iterable

from registry.config import DOCKER_HUB, HUB_LIBRARY, Settings
from storage.errors import NameInvalid, NameUnknown
from storage.names import MAX_NAME_LENGTH, RepositoryName
from storage.patterns import NamePattern


class NamingRules:
    """The rules for the upstreams in the settings.

    `upstreams`: their names, in the order of the settings. `default`: the upstream that names without a host may mean;
    None: such names are hosted."""

    def __init__(
        self, upstreams: Iterable[str] = (), *, default: str | None = None, prefixes: Iterable[str] = ()
    ) -> None:
        """`prefixes`: patterns of names that are always hosted. Raises ValueError if `default` is not in
        `upstreams`."""
        self.upstreams = tuple(upstreams)
        self.default = default
        if default is not None and default not in self.upstreams:
            raise ValueError(f"the default upstream {default} is not mirrored")
        self._upstream_names = frozenset(self.upstreams)
        self._hosted_patterns = [NamePattern(prefix) for prefix in prefixes]

    @classmethod
    def from_settings(cls, settings: Settings) -> NamingRules:
        """Returns the rules for the upstreams and prefixes in `settings`."""
        upstreams = [upstream.name for upstream in settings.upstream]
        return cls(upstreams, default=settings.default_upstream, prefixes=settings.hosted.prefixes)

    def upstream_of(self, name: str) -> str | None:
        """Returns the upstream that a name always belongs to; None: the name can be hosted."""
        first, slash, _ = name.partition("/")
        if first in self._upstream_names:
            return first
        return self.default if first == HUB_LIBRARY and slash else None

    def mirrored_name(self, repo: RepositoryName, upstream: str) -> RepositoryName:
        """Returns the stored name of the repository that `repo` means at `upstream`. Raises NameUnknown if `repo` is
        only the upstream's name, and NameInvalid if the stored name would be too long."""
        first, slash, rest = repo.partition("/")
        if first != upstream:
            rest = repo
        elif not slash:
            raise NameUnknown(f"{upstream} is mirrored here and is no repository itself; pull {upstream}/NAME")
        if upstream == DOCKER_HUB and "/" not in rest:
            rest = f"{HUB_LIBRARY}/{rest}"
        return RepositoryName(f"{upstream}/{rest}")

    def default_name(self, repo: RepositoryName) -> RepositoryName | None:
        """Returns the stored name of the repository that `repo` may mean at the default upstream.

        Returns None if it cannot mean one: there is no default upstream, the name belongs to an upstream, is always
        hosted, begins with the host of another registry, or would be too long as a stored name."""
        first, slash, _ = repo.partition("/")
        if self.default is None or (slash and ("." in first or first == "localhost")):
            return None
        if len(repo) + len(self.default) + len(HUB_LIBRARY) + 2 > MAX_NAME_LENGTH:
            return None
        if self.upstream_of(repo) is not None or any(pattern.matches(repo) for pattern in self._hosted_patterns):
            return None
        return self.mirrored_name(self.with_upstream(self.default, repo), self.default)

    def candidates(self, repo: RepositoryName) -> tuple[RepositoryName, ...]:
        """Returns the stored names that a read of `repo` may mean: one, or the hosted name followed by the name at the
        default upstream. If `repo` is only the name of an upstream, which is no repository, returns it unchanged."""
        upstream = self.upstream_of(repo)
        if upstream is not None:
            return (repo if repo == upstream else self.mirrored_name(repo, upstream),)
        default = self.default_name(repo)
        return (repo,) if default is None else (repo, default)

    def with_upstream(self, upstream: str, repo: RepositoryName) -> RepositoryName:
        """Returns `repo` with the upstream's name in front: `ghcr.io/org/app` for `org/app`. Returns `repo` unchanged
        if it begins with that name already. Raises NameInvalid if the result is too long."""
        return repo if repo.startswith(f"{upstream}/") else RepositoryName(f"{upstream}/{repo}")

    def possible_names(self, name: str) -> tuple[RepositoryName, ...]:
        """Returns the stored names that a request for `name` may mean at any upstream. A request may name its upstream
        outside the path, by its Host header or by `ns`, so each upstream gives one name."""
        stored_names = []
        for upstream in self.upstreams:
            try:
                stored_names.append(self.mirrored_name(self.with_upstream(upstream, RepositoryName(name)), upstream))
            except NameInvalid:  # too long below that upstream
                continue
        return tuple(stored_names)
