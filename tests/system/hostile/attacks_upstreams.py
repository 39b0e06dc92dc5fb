"""Attacks by upstreams: a client pulls through the mirror, and the upstream sends an expensive or invalid response."""

from __future__ import annotations

from functools import partial

from tests.system.hostile import costly_bodies
from tests.system.hostile.attack import Attack
from tests.system.hostile.attack_requests import AttackAnswer
from tests.system.hostile.attacked_site import AttackedSite
from tests.system.hostile.bad_upstreams import ANSWERS, SEARCH


def _pulled(name: str, item: str, site: AttackedSite) -> AttackAnswer:
    """Pulls `item` from the bad upstream `name`. `FRESH` in the item is replaced by a new text, so that no cache has
    it."""
    repo = site.upstreams.repository(name, site.fresh())
    return site.ask("GET", f"/v2/{repo}/{item.replace('FRESH', site.fresh())}")


def _searched(site: AttackedSite) -> AttackAnswer:
    """Searches for a new text. The server passes the search on to an upstream."""
    return site.ask("GET", f"/v1/search?q={site.fresh()}x&n=100")


_TAGS = frozenset({"tag-pages", "tag-loop", "tags-one-page", "tags-large-pages"})
_REFERRERS = frozenset({"referrers", "referrers-annotated"})
_BLOBS = frozenset({"wrong-blob", "blob-bytes"})
_LIMITS = {"endless": "32 MiB", "oversize": "16 MiB", "gzip-bomb": "64 MiB", "error-large": "12 MiB"}


def _item(name: str) -> str:
    """Returns what is requested from this upstream: the path below the repository."""
    if name in _TAGS:
        return "tags/list"
    if name in _REFERRERS:
        return f"referrers/{costly_bodies.digest(1)}"
    return f"blobs/{costly_bodies.digest(2)}" if name in _BLOBS else "manifests/FRESH"


def _limit(name: str) -> str:
    """Returns the limit or size that the table shows for this upstream."""
    if name.startswith("token"):
        return "256 KiB"
    if name in ("cookies", "short-headers", "interim-responses", "trailers"):
        return "500 lines"
    if name.startswith(("error", "long", "challenge")):
        return _LIMITS.get(name, "64 KiB")
    return _LIMITS.get(name, "8 MiB")


ATTACKS = [
    *(
        Attack(f"upstream: {name}", _limit(name), partial(_pulled, name, _item(name)))
        for name in ANSWERS
        if name != SEARCH
    ),
    Attack("upstream: search results", "1 MiB", _searched),
    Attack("upstream: redirected blob", "", partial(_pulled, "redirects", f"blobs/{costly_bodies.digest(3)}")),
    Attack("upstream: gzip-bomb as a list", "64 MiB", partial(_pulled, "gzip-bomb", "tags/list")),
    Attack("upstream: empty-objects as a list of tags", "8 MiB", partial(_pulled, "empty-objects", "tags/list")),
    Attack("upstream: deep as a list of tags", "8 MiB", partial(_pulled, "deep", "tags/list")),
    Attack(
        "upstream: many-children as referrers",
        "8 MiB",
        partial(_pulled, "many-children", f"referrers/{costly_bodies.EMPTY}"),
    ),
]
