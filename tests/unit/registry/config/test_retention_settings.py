"""Tests that load the settings `[[retention]]` (rules for deleting old tags) and `[upkeep]`. Valid values are accepted.
An invalid value causes ConfigError, whose text tells the operator what to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.config.settings_sources import ConfigError, load_settings


def load(tmp_path: Path, text: str) -> None:
    file = tmp_path / "entrepot.toml"
    file.write_text(text)
    load_settings({}, file)


RULE = '[[retention]]\nrepositories = "team/**"\n'


def test_the_values_of_a_rule(tmp_path: Path) -> None:
    """A single pattern need not be a list. Durations are written with units."""
    file = tmp_path / "entrepot.toml"
    file.write_text(
        RULE + 'keep_last = 10\nkeep_tags = ["v*", "latest"]\nkeep_pushed_within = "30d"\n'
        'keep_pulled_within = "14d"\ndelete_untagged_after = "7d"\n[upkeep]\nretention_every = 0\n'
    )
    settings = load_settings({}, file).settings
    [rule] = settings.retention
    assert (rule.repositories, rule.keep_last, rule.keep_tags) == (["team/**"], 10, ["v*", "latest"])
    assert (rule.keep_pushed_within, rule.keep_pulled_within) == (30 * 86400, 14 * 86400)
    assert rule.delete_untagged_after == 7 * 86400
    assert settings.upkeep.retention_every == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RULE, "the rule would delete every tag"),
        (RULE + "keep_last = 0\n", "the rule would delete every tag"),
        (RULE + 'keep_tags = []\nkeep_pushed_within = "0s"\n', "the rule would delete every tag"),
        (RULE + 'delete_untagged_after = "7d"\n', 'to delete only untagged manifests, set keep_tags = ["*"]'),
        (RULE + "keep_last = 1\ndelete_all = true\n", "delete_all is set, but a condition keeps tags"),
        (RULE + "keep_last = -1\n", "retention[1].keep_last: -1 should be greater than or equal to 0"),
        (RULE + "keep_lats = 1\n", "did you mean retention.keep_last?"),
        (RULE + "keep_last = 1\n[upkeep]\nretention_evry = 1\n", "did you mean upkeep.retention_every?"),
        (RULE + 'keep_tags = ["a b"]\n', "'a b' is not a pattern of tags"),
        (RULE + 'keep_pulled_within = "soon"\n', "'soon' is not a duration"),
        ('[[retention]]\nrepositories = "Team/"\nkeep_last = 1\n', "is not a pattern of names"),
        ("[[retention]]\nrepositories = []\nkeep_last = 1\n", "at least 1 item"),
        ("[[retention]]\nkeep_last = 1\n", "retention[1].repositories: is missing"),
        ('[retention]\nrepositories = "team/**"\n', "write [[retention]]"),
        (
            '[[upstream]]\nname = "ghcr.io"\n[[retention]]\nrepositories = "ghcr.io/**"\nkeep_last = 1\n',
            "'ghcr.io/**' names mirrored repositories, but rules apply only to repositories that clients push to; to "
            "limit the size of a mirror's cache, set cache_max",
        ),
        (
            'mirror = ["docker.io"]\n[[retention]]\nrepositories = ["team/*", "library/*"]\nkeep_last = 1\n',
            "'library/*' names mirrored repositories",
        ),
    ],
)
def test_invalid_rules_are_refused(tmp_path: Path, text: str, message: str) -> None:
    """Each error is one line that says what to do."""
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, text)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_rule_that_deletes_everything_needs_delete_all(tmp_path: Path) -> None:
    """A rule without a condition that keeps tags is accepted with `delete_all`."""
    load(tmp_path, RULE + "delete_all = true\n")
    load(tmp_path, RULE + "keep_last = 0\ndelete_all = true\n")


def test_rules_in_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an environment variable, the rules are written as JSON. An error names the variable."""
    monkeypatch.setenv("ENTREPOT_RETENTION", '[{"repositories": "team/**", "keep_last": 3}]')
    assert load_settings({}).settings.retention[0].keep_last == 3
    monkeypatch.setenv("ENTREPOT_RETENTION", "team/**")
    with pytest.raises(ConfigError, match=r"ENTREPOT_RETENTION: not JSON; write it like \[\{\"repositories\""):
        load_settings({})
