"""Test data for access rights: visitors with different grants, and repositories with similar names. A grant gives a
visitor the right to certain actions on the repositories that match a pattern.

`may_pull` computes from the grants which visitor may pull from which repository. It uses regular expressions and shares
no code with the registry, so that tests can compare the two. Some grants are written in this module. The others are
random, but the same in each run, because the seed is fixed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

MIRROR: Final = "docker.io"
PRIVATE: Final = "ghcr.io"
"""An upstream with `require_grant`: only grants whose pattern begins with its name give access to its repositories."""
UPSTREAMS: Final = [
    {"name": MIRROR, "default": True, "endpoints": ["http://127.0.0.1:9"]},
    {"name": PRIVATE, "require_grant": True, "endpoints": ["http://127.0.0.1:9"]},
]
REPOSITORIES: Final = {
    "webapp": "almond",
    "crew/app": "basil",
    "docker.iox/app": "cedar",
    "ghcr.iox/app": "dahlia",
    "public/app": "elder",
    "secret/app": "fennel",
    "team-x/app": "ginger",
    "team/app": "hazel",
    "team/app-web": "iris",
    "team/app/db": "juniper",
    "docker.io/corp/app": "kumquat",
    "docker.io/library/app": "lavender",
    "ghcr.io/corp/app": "myrtle",
    "ghcr.io/corp/app-tool": "nutmeg",
    "ghcr.io/other/app": "olive",
}
"""A word for each repository. The word occurs only in the tag, the labels and the description of this repository."""
_SEED: Final = 20260711
_DRAWN_VISITORS: Final = 4
"""Number of visitors with random grants."""
Grants = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class MatrixVisitor:
    """A client of the registry. `name`: the name of its account; None: the client does not log in. `grants`: pairs of a
    pattern and actions. `group`: a group of the account; the grants are then those of the group. `limits`: the limits
    of the API token with which the client logs in, also pairs of a pattern and actions; None: there are no limits."""

    label: str
    name: str | None
    grants: Grants = ()
    group: str | None = None
    limits: Grants | None = None
    is_admin: bool = False
    is_robot: bool = False

    @property
    def subject(self) -> str:
        """The subject of the visitor's grants, in the notation of the API."""
        return f"group:{self.group}" if self.group else f"{'robot' if self.is_robot else 'user'}:{self.name}"

    @property
    def has_session(self) -> bool:
        """Whether the visitor can use the web UI. Robots and clients with a limited token cannot."""
        return not self.is_robot and self.limits is None


@dataclass(frozen=True)
class SharedGrants:
    """Grants that do not belong to one visitor: those for every client (`everyone`), and those for every account
    (`authenticated`)."""

    everyone: Grants = ()
    authenticated: Grants = ()


PHASES: Final = {
    "for all": SharedGrants(
        (("public/**", "pull"), ("**", "push"), ("docker.io/library/*", "pull")),
        (("team/app", "pull"), ("**", "delete")),
    ),
    "for nobody": SharedGrants(),
}
"""The shared grants in the two phases of a test. The first phase has such grants. The second phase has none, but the
sessions and tokens of the first phase still exist."""


def matrix_visitors() -> list[MatrixVisitor]:
    """Returns the visitors; they are the same in each run."""
    return [
        MatrixVisitor("nobody", None),
        MatrixVisitor("an admin", "root", is_admin=True),
        MatrixVisitor("an admin with a limited token", "root", limits=(("crew/**", "pull"),), is_admin=True),
        MatrixVisitor("a member without grants", "none"),
        MatrixVisitor("one name", "one", (("team/app", "pull"),)),
        MatrixVisitor("one level", "level", (("team/*", "pull,push"), ("*", "pull"))),
        MatrixVisitor("a prefix", "prefix", (("team/app**", "pull"), ("team**", "push"))),
        MatrixVisitor("everything that is not private", "wide", (("**", "pull"),)),
        MatrixVisitor("a private upstream", "private", (("ghcr.io/corp/*", "pull"), ("ghcr.io/**", "push"))),
        MatrixVisitor("a group", "grouped", (("docker.io/**", "pull"), ("crew/app", "pull")), group="dev"),
        MatrixVisitor("no right to pull", "pusher", (("**", "push,delete"), ("ghcr.io/**", "push"))),
        MatrixVisitor("a robot", "robo", (("ghcr.io/**", "pull"), ("team/app-*", "pull")), is_robot=True),
        MatrixVisitor(
            "a limited token", "wide", (("**", "pull"),), limits=(("team/*", "pull"), ("**", "push"), ("g**", "pull"))
        ),
        *_drawn_visitors(random.Random(_SEED)),
    ]


def _drawn_visitors(rng: random.Random) -> Iterator[MatrixVisitor]:
    """Yields visitors with random grants. Each pattern is a whole repository name, or the beginning of a name followed
    by one or two stars."""
    for number in range(_DRAWN_VISITORS):
        grants = {}
        for _ in range(rng.randint(1, 4)):
            name = rng.choice(list(REPOSITORIES))
            prefix_length = rng.randint(1, len(name))
            star = rng.choice(["*", "**"]) if prefix_length < len(name) else ""
            grants[name[:prefix_length] + star] = rng.choice(["pull", "pull", "pull,push", "push", "delete"])
        yield MatrixVisitor(f"drawn: {grants}", f"drawn{number}", tuple(grants.items()))


def may_pull(visitor: MatrixVisitor, repo: str, shared: SharedGrants) -> bool:
    """Returns whether a visitor may pull from a repository."""
    if not visitor.is_admin:
        account_grants = () if visitor.name is None else (*shared.authenticated, *visitor.grants)
        all_grants = (*shared.everyone, *account_grants)
        granted_patterns = [pattern for pattern, actions in all_grants if "pull" in actions.split(",")]
        if repo.startswith(f"{PRIVATE}/"):
            granted_patterns = [pattern for pattern in granted_patterns if pattern.startswith(f"{PRIVATE}/")]
        if not _matches_any(granted_patterns, repo):
            return False
    limit_patterns = (
        None
        if visitor.limits is None
        else [pattern for pattern, actions in visitor.limits if "pull" in actions.split(",")]
    )
    return limit_patterns is None or _matches_any(limit_patterns, repo)


def _matches_any(patterns: list[str], repo: str) -> bool:
    return any(re.fullmatch(_expression(pattern), repo) for pattern in patterns)


def _expression(pattern: str) -> str:
    """Returns a regular expression for a pattern: `**` matches any text, `*` any text without a slash."""
    return "".join({"**": ".*", "*": "[^/]*"}.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*)", pattern))


def mirrored_name(repo: str) -> str:
    """Returns the full name of the mirrored repository that has the short name `repo`. Until somebody pushes to `repo`,
    clients that pull from `repo` get the content of this mirrored repository."""
    return f"{MIRROR}/{repo}" if "/" in repo else f"{MIRROR}/library/{repo}"
