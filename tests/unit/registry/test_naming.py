"""The rules for repository names. A name in a request, such as `ubuntu`, can mean one or several stored names, such as
`docker.io/library/ubuntu`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.naming import NamingRules
from storage.errors import NameInvalid, NameUnknown
from storage.names import MAX_NAME_LENGTH, RepositoryName

UPSTREAMS = ("docker.io", "ghcr.io")
RULES = NamingRules(UPSTREAMS, default="docker.io", always_hosted=["own/**", "shop"])


def candidates(name: str, rules: NamingRules = RULES) -> list[str]:
    return list(rules.candidates(RepositoryName(name)))


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("ghcr.io/org/app", ["ghcr.io/org/app"]),
        ("docker.io/ubuntu", ["docker.io/library/ubuntu"]),
        ("docker.io/library/ubuntu", ["docker.io/library/ubuntu"]),
        ("library/ubuntu", ["docker.io/library/ubuntu"]),
        ("ubuntu", ["ubuntu", "docker.io/library/ubuntu"]),
        ("team/app", ["team/app", "docker.io/team/app"]),
        ("library", ["library", "docker.io/library/library"]),
        ("own/app", ["own/app"]),
        ("shop", ["shop"]),
        ("quay.io/org/app", ["quay.io/org/app"]),
        ("localhost/app", ["localhost/app"]),
        ("docker.io", ["docker.io"]),
        ("a" * (MAX_NAME_LENGTH - 5), ["a" * (MAX_NAME_LENGTH - 5)]),
    ],
)
def test_candidates(name: str, stored: list[str]) -> None:
    """A name that begins with an upstream's name and a slash belongs to the upstream. A name that is only an upstream's
    name stays as it is. Names with the host of a registry that is not mirrored, names that match a hosted pattern, and
    names that would be too long are hosted. Any other name can be hosted or belong to the default upstream."""
    assert candidates(name) == stored


def test_without_a_default_upstream() -> None:
    """Without a default upstream, only names that begin with an upstream's name are mirrored."""
    rules = NamingRules(UPSTREAMS)
    assert candidates("ubuntu", rules) == ["ubuntu"]
    assert candidates("library/ubuntu", rules) == ["library/ubuntu"]
    assert candidates("ghcr.io/a", rules) == ["ghcr.io/a"]


def test_without_upstreams() -> None:
    """Without upstreams, each name means the stored name with the same text."""
    assert candidates("docker.io/ubuntu", NamingRules()) == ["docker.io/ubuntu"]
    assert NamingRules().names_at_all_upstreams("ubuntu") == ()


def test_the_name_of_an_upstream_is_no_repository() -> None:
    """A name that is only the name of an upstream is not a repository."""
    with pytest.raises(NameUnknown):
        RULES.mirrored_name(RepositoryName("ghcr.io"), "ghcr.io")


def test_with_upstream() -> None:
    """`with_upstream` adds the upstream's name to the beginning of a name, unless the name already begins with it. If
    the result is too long, it raises an error."""
    assert RULES.with_upstream("ghcr.io", RepositoryName("a/b")) == "ghcr.io/a/b"
    assert RULES.with_upstream("ghcr.io", RepositoryName("ghcr.io/a")) == "ghcr.io/a"
    with pytest.raises(NameInvalid):
        RULES.with_upstream("ghcr.io", RepositoryName("a" * MAX_NAME_LENGTH))


NAME_PARTS = st.sampled_from(
    ["library", "ubuntu", "team", "own", "docker.io", "ghcr.io", "quay.io", "localhost", "a" * 120]
)
NAMES = st.lists(NAME_PARTS, min_size=1, max_size=3).map("/".join).filter(lambda name: len(name) <= MAX_NAME_LENGTH)


@given(NAMES, st.sampled_from([None, *UPSTREAMS]), st.sampled_from([None, *UPSTREAMS]))
@pytest.mark.slow
def test_upstream_names_include_all_candidates(name: str, asked_upstream: str | None, default: str | None) -> None:
    """A token grants rights to the requested name and to the names of `names_at_all_upstreams`. A request may also name
    an upstream (`asked_upstream`). Every stored name for which its rights are then checked is among these names."""
    rules = NamingRules(UPSTREAMS, default=default)
    requested = RepositoryName(name)
    try:
        full_name = requested if asked_upstream is None else rules.with_upstream(asked_upstream, requested)
        stored = rules.candidates(full_name)
    except (NameInvalid, NameUnknown):
        return
    assert set(stored) <= {name, *rules.names_at_all_upstreams(name), *((full_name,) if full_name in UPSTREAMS else ())}
