"""The settings of quotas, of the cache and of free disk space: the errors for invalid values, and the limits that
follow from valid values."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.config.settings_sources import ConfigError, load_settings
from registry.upkeep.budgets import budget_of, cache_limits, min_free_space, scope_definitions
from storage.data_dir.reserve import MinFreeSpace
from storage.names import RepositoryName
from storage.upkeep.evictor import Budget
from storage.usage import ScopeDefinition

MIRRORS = '[[upstream]]\nname = "docker.io"\ncache_max = "2GiB"\n[[upstream]]\nname = "ghcr.io"\n'
GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[quota]]\nprefix = "team"\nmax_tags = 1', "'team' does not end with a slash; for all repositories below it"),
        ('[[quota]]\nprefix = "Team/"\nmax_tags = 1', "'Team/' is not the beginning of repository names, like team/"),
        ('[[quota]]\nprefix = "team/"', "the quota of 'team/' limits nothing; set max_size or max_tags"),
        ('[[quota]]\nprefix = "team/"\nmax_tags = 0', "quota[team/].max_tags"),
        ('[[quota]]\nprefix = "team/"\nmax_sise = 5', "unknown setting; did you mean quota.max_size?"),
        ('[[quota]]\nprefix = "a/"\nmax_tags = 1\n' * 2, "there are two quotas with the prefix 'a/'"),
        (f'{MIRRORS}[[quota]]\nprefix = "ghcr.io/"\nmax_tags = 1', "to limit a cache, set cache_max"),
        ('[cache]\nkeep = ["docker.io/library/"]', "for all names below it write docker.io/library/**"),
        ('[cache]\nmax = "much"', "cache.max"),
        ('[cache]\nmin_free = "2GiB"\ntarget_free = "1GiB"', "target_free is less than min_free"),
        ("[disk]\nmin_free_percent = 90", "disk.min_free_percent"),
        ('[quota]\nprefix = "a/"', "write [[quota]]"),
    ],
)
def test_invalid_limits_are_refused(tmp_path: Path, text: str, message: str) -> None:
    """Each error is one line that says what is wrong."""
    file = tmp_path / "entrepot.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_settings({}, file)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_scopes_and_limits(tmp_path: Path) -> None:
    """A usage scope is a set of repositories whose size is counted together. There is one for each upstream, one for
    all upstreams together, and one for each quota. A quota for all names does not count mirrored repositories."""
    file = tmp_path / "entrepot.toml"
    file.write_text(
        '[cache]\nmax = "3GiB"\nkeep = ["docker.io/library/*"]\nmin_free = "10GiB"\n[disk]\nmin_free = "1GiB"\n'
        f'{MIRRORS}[[quota]]\nprefix = ""\nmax_size = "1GiB"\n[[quota]]\nprefix = "team/"\nmax_tags = 5\n'
    )
    settings = load_settings({}, file).settings
    upstreams = ("docker.io/", "ghcr.io/")
    assert scope_definitions(settings) == [
        ScopeDefinition("cache docker.io", ("docker.io/",), upstream="docker.io"),
        ScopeDefinition("cache ghcr.io", ("ghcr.io/",), upstream="ghcr.io"),
        ScopeDefinition("cache", upstreams),
        ScopeDefinition("quota ", ("",), excluded=upstreams, max_bytes=GIB),
        ScopeDefinition("quota team/", ("team/",), max_tags=5),
    ]
    limits = cache_limits(settings)
    assert limits.budgets == (
        Budget("cache docker.io", ("docker.io",), 2 * GIB),
        Budget("cache", ("docker.io", "ghcr.io"), 3 * GIB),
    )
    assert (limits.low_free, limits.high_free) == (10 * GIB, 11 * GIB)
    names = ("docker.io/library/app", "docker.io/team/app", "docker.io/library/a/b")
    assert [limits.is_kept(RepositoryName(name)) for name in names] == [True, False, False]
    assert budget_of(settings, None, 5) == Budget("cache", ("docker.io", "ghcr.io"), 5)
    assert budget_of(settings, "ghcr.io", 5) == Budget("cache ghcr.io", ("ghcr.io",), 5)
    assert min_free_space(settings) == MinFreeSpace(GIB, 0)


def test_nothing_is_limited_by_default() -> None:
    """Without these settings, there are no scopes and no limits."""
    settings = load_settings({}).settings
    assert not cache_limits(settings)
    assert scope_definitions(settings) == []
    assert min_free_space(settings) is None


@pytest.mark.parametrize("name", ["ENTREPOT_GC__X", "entrepot_gc__x"])
def test_unknown_variable_of_a_group_is_ignored(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A variable that begins with the name of a group, but belongs to no setting, causes a warning and no error, in
    upper and in lower case."""
    monkeypatch.setenv(name, "1")
    (warning,) = load_settings({}).warnings
    assert warning.startswith(f"{name} is no setting and is ignored")
