"""`NamingRules`: maps the repository name in a request to the stored names that it can mean.

An *upstream* is another registry that this registry mirrors. Clients push to a *hosted* repository. The *stored name*
of a repository is its name in the store. Clients can use several names for one mirrored repository, such as `ubuntu`
and `library/ubuntu` for an image of Docker Hub. The stored name of a mirrored repository begins with the upstream's
name: `docker.io/library/ubuntu`.

The first rule that fits a name decides:

- A name that begins with an upstream's name, such as `ghcr.io/org/app`, belongs to that upstream.
- If the settings name a default upstream, `library/*` belongs to that upstream.
- A name that matches a pattern in the setting `[hosted] prefixes` is hosted.
- If the settings name a default upstream, any other name without a host, such as `team/app`, can mean a hosted
  repository or a repository of that upstream. `registry.router` decides: after the first push to the name, the name is
  hosted.
- Every other name is hosted, even if it begins with the host of a registry that is not mirrored.

The rules use only names and settings. They do not depend on what the store contains.
"""

from __future__ import annotations

from collections.abc import Iterable

from registry.config import DOCKER_HUB, HUB_LIBRARY, Settings
from storage.errors import NameInvalid, NameUnknown
from storage.names import MAX_NAME_LENGTH, RepositoryName
from storage.patterns import NamePattern


class NamingRules:
    """The rules for a list of upstreams.

    `upstreams`: the names of the upstreams, in the order of the settings. `default`: the name of the default upstream;
    None if there is no default upstream."""

    def __init__(
        self, upstreams: Iterable[str] = (), *, default: str | None = None, always_hosted: Iterable[str] = ()
    ) -> None:
        """`always_hosted`: patterns of names that never mean a repository of the default upstream. Raises ValueError if
        `default` is not in `upstreams`."""
        self.upstreams = tuple(upstreams)
        self.default = default
        if default is not None and default not in self.upstreams:
            raise ValueError(f"the default upstream {default} is not mirrored")
        self._upstream_names = frozenset(self.upstreams)
        self._hosted_patterns = [NamePattern(pattern) for pattern in always_hosted]

    @classmethod
    def from_settings(cls, settings: Settings) -> NamingRules:
        """Returns the rules for `settings`."""
        upstreams = [upstream.name for upstream in settings.upstream]
        return cls(upstreams, default=settings.default_upstream, always_hosted=settings.hosted.prefixes)

    def upstream_of(self, name: str) -> str | None:
        """Returns the name of the upstream to which a repository name belongs. Returns None if the name is hosted or
        can be hosted. Does not check whether the name is valid."""
        first_part, slash, _ = name.partition("/")
        if first_part in self._upstream_names:
            return first_part
        return self.default if first_part == HUB_LIBRARY and slash else None

    def mirrored_name(self, repo: RepositoryName, upstream: str) -> RepositoryName:
        """Returns the stored name of the repository that `repo` means at `upstream`. `repo` may have the upstream's
        name in front. Raises NameUnknown if `repo` is only the upstream's name, and NameInvalid if the stored name
        would be too long."""
        first_part, slash, rest_of_name = repo.partition("/")
        if first_part != upstream:
            rest_of_name = repo
        elif not slash:
            raise NameUnknown(f"{upstream} is mirrored here and is no repository itself; pull {upstream}/NAME")
        if upstream == DOCKER_HUB and "/" not in rest_of_name:  # an official image
            rest_of_name = f"{HUB_LIBRARY}/{rest_of_name}"
        return RepositoryName(f"{upstream}/{rest_of_name}")

    def name_at_default_upstream(self, repo: RepositoryName) -> RepositoryName | None:
        """Returns the stored name of the repository that `repo` can mean at the default upstream. Returns None in these
        cases:

        - There is no default upstream.
        - `repo` belongs to an upstream, is always hosted, or begins with the host of another registry.
        - The stored name could be too long."""
        first_part, slash, _ = repo.partition("/")
        if self.default is None or (slash and ("." in first_part or first_part == "localhost")):
            return None
        max_stored_length = len(self.default) + len(HUB_LIBRARY) + len(repo) + 2  # 2 for the slashes
        if max_stored_length > MAX_NAME_LENGTH:
            return None
        if self.upstream_of(repo) is not None or any(pattern.matches(repo) for pattern in self._hosted_patterns):
            return None
        return self.mirrored_name(self.with_upstream(self.default, repo), self.default)

    def candidates(self, repo: RepositoryName) -> tuple[RepositoryName, ...]:
        """Returns the *candidates* of `repo`: the stored names that it can mean in a read. The result has one name, or
        first the hosted name and then the name at the default upstream. If `repo` is only the name of an upstream,
        returns only `repo`."""
        upstream = self.upstream_of(repo)
        if upstream is not None:
            return (repo if repo == upstream else self.mirrored_name(repo, upstream),)
        mirrored = self.name_at_default_upstream(repo)
        return (repo,) if mirrored is None else (repo, mirrored)

    def with_upstream(self, upstream: str, repo: RepositoryName) -> RepositoryName:
        """Returns `repo` with the upstream's name in front: `ghcr.io/org/app` for `org/app`. Returns `repo` unchanged
        if it already begins with the upstream's name and a slash. Raises NameInvalid if the result is too long."""
        return repo if repo.startswith(f"{upstream}/") else RepositoryName(f"{upstream}/{repo}")

    def names_at_all_upstreams(self, name: str) -> tuple[RepositoryName, ...]:
        """For each upstream, returns the stored name of the repository that `name` means at this upstream. Leaves out
        stored names that would be too long."""
        stored_names = []
        for upstream in self.upstreams:
            try:
                stored_names.append(self.mirrored_name(self.with_upstream(upstream, RepositoryName(name)), upstream))
            except NameInvalid:  # too long
                continue
        return tuple(stored_names)
