"""Visitors with grants of many patterns, repositories with similar names, and which of the visitors may pull from which
of the repositories.

`may_pull` computes this from the grants alone, with regular expressions. It shares no code with the registry. Some
grants are written in this module. The others are random, but the same in each run, because the seed is fixed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

MIRROR: Final = "docker.io"
PRIVATE: Final = "ghcr.io"
"""An upstream whose repositories need grants that begin with its name."""
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
"""Each repository, and a word that occurs in its tag, its labels and its description, and nowhere else."""
_SEED: Final = 20260711
_DRAWN_VISITORS: Final = 4
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
        """The subject of the grants."""
        return f"group:{self.group}" if self.group else f"{'robot' if self.is_robot else 'user'}:{self.name}"

    @property
    def has_session(self) -> bool:
        """Whether the visitor looks at pages: robots and clients with a limited token cannot."""
        return not self.is_robot and self.limits is None


@dataclass(frozen=True)
class Everybody:
    """Grants for more than one visitor: to every client, and to every account."""

    everyone: Grants = ()
    authenticated: Grants = ()


PHASES: Final = {
    "for all": Everybody(
        (("public/**", "pull"), ("**", "push"), ("docker.io/library/*", "pull")),
        (("team/app", "pull"), ("**", "delete")),
    ),
    "for nobody": Everybody(),
}
"""Further grants, which a test applies one phase after the other. In the second phase these grants are removed, while
sessions and tokens stay."""


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


def _drawn_visitors(chance: random.Random) -> Iterator[MatrixVisitor]:
    """Yields visitors with random grants. Each pattern is a whole repository name, or a beginning of one and stars."""
    for number in range(_DRAWN_VISITORS):
        grants = {}
        for _ in range(chance.randint(1, 4)):
            name = chance.choice(list(REPOSITORIES))
            cut = chance.randint(1, len(name))
            star = chance.choice(["*", "**"]) if cut < len(name) else ""
            grants[name[:cut] + star] = chance.choice(["pull", "pull", "pull,push", "push", "delete"])
        yield MatrixVisitor(f"drawn: {grants}", f"drawn{number}", tuple(grants.items()))


def may_pull(visitor: MatrixVisitor, repo: str, everybody: Everybody) -> bool:
    """Returns whether a visitor may pull from a repository."""
    if not visitor.is_admin:
        named = () if visitor.name is None else (*everybody.authenticated, *visitor.grants)
        granted = [pattern for pattern, actions in (*everybody.everyone, *named) if "pull" in actions.split(",")]
        if repo.startswith(f"{PRIVATE}/"):
            granted = [pattern for pattern in granted if pattern.startswith(f"{PRIVATE}/")]
        if not _matches_any(granted, repo):
            return False
    limits = None if visitor.limits is None else [pattern for pattern, actions in visitor.limits if "pull" in actions]
    return limits is None or _matches_any(limits, repo)


def _matches_any(patterns: list[str], repo: str) -> bool:
    return any(re.fullmatch(_expression(pattern), repo) for pattern in patterns)


def _expression(pattern: str) -> str:
    return "".join({"**": ".*", "*": "[^/]*"}.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*)", pattern))


def mirrored_name(repo: str) -> str:
    """Returns the mirrored repository that clients reach under a hosted name, until somebody pushes to that name."""
    return f"{MIRROR}/{repo}" if "/" in repo else f"{MIRROR}/library/{repo}"
