"""How a retention rule decides about a tag. A tag is kept if at least one condition of the rule keeps it. The reason
names the condition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.config import RetentionRule
from registry.upkeep.retention.decision import Decision, decide, unused_since
from storage.content import digest_of
from storage.names import Tag
from storage.recorded_periods import RecordedPeriods
from storage.retention import TagFacts, TagPosition, UnusedSince
from tests.fakes.upkeep_store import DAY, START

NOW = START + 100 * DAY


def rule(**conditions: Any) -> RetentionRule:
    return RetentionRule(repositories=["team/**"], delete_all=not conditions, **conditions)


def tag_facts(name: str = "tag", *, pushed: float = 50, pulled: float | None = None) -> TagFacts:
    """Returns the facts of a tag that was pushed `pushed` days ago and pulled `pulled` days ago."""
    when_pulled = None if pulled is None else NOW - pulled * DAY
    return TagFacts(Tag(name), digest_of(name.encode()), 1, NOW - pushed * DAY, when_pulled)


@pytest.mark.parametrize(
    ("conditions", "facts", "reason"),
    [
        ({"keep_tags": ["v*", "latest"]}, tag_facts("v1.0"), "matches v*"),
        ({"keep_tags": ["v*", "latest"]}, tag_facts("latest"), "matches latest"),
        ({"keep_tags": ["[0-9]*"]}, tag_facts("1.0"), "matches [0-9]*"),
        ({"keep_pushed_within": "30d"}, tag_facts(pushed=29), "pushed within 30d"),
        ({"keep_pulled_within": "14d"}, tag_facts(pulled=13), "pulled within 14d"),
        ({"keep_pushed_within": "1h", "keep_pulled_within": "14d"}, tag_facts(pulled=0), "pulled within 14d"),
    ],
)
def test_a_condition_keeps_a_tag(conditions: dict[str, Any], facts: TagFacts, reason: str) -> None:
    """A tag that a condition keeps is kept, and the reason names this condition."""
    assert decide(rule(**conditions), facts, NOW, oldest_kept=None) == Decision(True, reason)


@pytest.mark.parametrize(
    ("conditions", "facts", "reason"),
    [
        ({"keep_tags": ["v*"]}, tag_facts("V1"), "pushed 2024-01-03, never pulled"),
        ({"keep_pushed_within": "30d"}, tag_facts(pushed=31), "never pulled"),
        ({"keep_pulled_within": "14d"}, tag_facts(pushed=50, pulled=15), "last pulled 2024-02-07"),
        ({"keep_pulled_within": "14d"}, tag_facts(pushed=1), "never pulled"),
        ({"delete_untagged_after": "7d", "keep_tags": ["other"]}, tag_facts(), "never pulled"),
    ],
)
def test_a_tag_that_no_condition_keeps_is_deleted(conditions: dict[str, Any], facts: TagFacts, reason: str) -> None:
    """A tag that no condition keeps is deleted. The reason states when it was pushed and pulled."""
    decision = decide(rule(**conditions), facts, NOW, oldest_kept=None)
    assert not decision.is_kept
    assert decision.reason.endswith(reason)


def test_the_reason_of_a_deletion_has_all_facts() -> None:
    """The reason of a deletion states that the tag is not one of the newest, when it was pushed, and when it was
    pulled."""
    oldest_kept = TagPosition(NOW - DAY, "newer")
    decision = decide(rule(keep_last=10), tag_facts(pushed=50, pulled=20), NOW, oldest_kept=oldest_kept)
    assert decision == Decision(False, "not one of the newest 10, pushed 2024-01-03, last pulled 2024-02-02")


def test_the_newest_tags_are_kept() -> None:
    """`keep_last` keeps the newest tags, by their push time and name. `decide` gets the oldest tag that `keep_last`
    keeps (`oldest_kept`). None: the repository has no more than `keep_last` tags, and all are kept."""
    oldest_kept = TagPosition(NOW - 5 * DAY, "m")
    kept_by_tag = {
        (name, pushed): decide(rule(keep_last=3), tag_facts(name, pushed=pushed), NOW, oldest_kept=oldest_kept).is_kept
        for name in ("a", "m", "z")
        for pushed in (4, 5, 6)
    }
    assert {key for key, is_kept in kept_by_tag.items() if is_kept} == {
        ("a", 4),
        ("m", 4),
        ("z", 4),
        ("a", 5),
        ("m", 5),
    }
    decision = decide(rule(keep_last=3), tag_facts(pushed=99), NOW, oldest_kept=None)
    assert decision == Decision(True, "one of the newest 3")


def test_a_tag_that_may_have_been_pulled_is_kept() -> None:
    """Pulls before an update of the program, or between a backup and its restore, were not recorded. A tag is kept as
    long as such a pull could keep it."""
    facts = replace(tag_facts(pushed=50), unrecorded_until=NOW - 5 * DAY)
    decision = decide(rule(keep_pulled_within="14d"), facts, NOW, oldest_kept=None)
    assert decision == Decision(True, "may have been pulled within 14d: not all pulls before 2024-02-17 are recorded")
    decision = decide(rule(keep_pulled_within="4d"), facts, NOW, oldest_kept=None)
    assert decision == Decision(False, "pushed 2024-01-03, not pulled since 2024-02-17")
    assert not decide(rule(keep_pushed_within="1d"), facts, NOW, oldest_kept=None).is_kept


def test_an_immutable_tag_is_always_kept() -> None:
    """An immutable tag is kept even if the rule deletes all tags."""
    assert decide(rule(), tag_facts(), NOW, oldest_kept=None, is_protected=True) == Decision(True, "it is immutable")
    assert not decide(rule(), tag_facts(), NOW, oldest_kept=None).is_kept


DAYS = st.floats(min_value=0, max_value=99, allow_nan=False)
CONDITIONS = st.fixed_dictionaries(
    {
        "keep_tags": st.lists(st.sampled_from(["v*", "latest", "*-rc"]), unique=True),
        "keep_pushed_within": st.sampled_from([0.0, DAY, 30 * DAY]),
        "keep_pulled_within": st.sampled_from([0.0, DAY, 30 * DAY]),
        "keep_last": st.integers(min_value=0, max_value=3),
    }
)


@given(
    conditions=CONDITIONS,
    name=st.sampled_from(["v1", "latest", "main", "1-rc"]),
    pushed=DAYS,
    pulled=st.none() | DAYS,
    oldest_kept=st.none()
    | st.builds(TagPosition, DAYS.map(lambda days: NOW - days * DAY), st.sampled_from(["a", "z"])),
)
def test_each_condition_alone_is_enough(
    conditions: dict[str, Any], name: str, pushed: float, pulled: float | None, oldest_kept: TagPosition | None
) -> None:
    """A rule keeps a tag exactly if at least one rule with only one of its conditions keeps the tag."""
    facts = tag_facts(name, pushed=pushed, pulled=pulled)
    single_condition_rules = [rule(**{condition: value}) for condition, value in conditions.items() if value]
    if single_condition_rules:
        decisions = [decide(each, facts, NOW, oldest_kept=oldest_kept) for each in single_condition_rules]
        is_kept = decide(rule(**conditions), facts, NOW, oldest_kept=oldest_kept).is_kept
        assert is_kept == any(decision.is_kept for decision in decisions)


def test_limits_for_untagged_manifests() -> None:
    """By default, untagged manifests are not deleted. With `delete_untagged_after`, they are deleted when they have
    been untagged and not pulled for this time, but not within an hour of their push or pull. A pull within
    `keep_pulled_within` keeps them as well."""
    assert unused_since(rule(keep_last=1), NOW) is None
    assert unused_since(rule(keep_last=1, delete_untagged_after="0s"), NOW) == UnusedSince(NOW - 3600, NOW, NOW - 3600)
    week, fortnight = NOW - 7 * DAY, NOW - 14 * DAY
    assert unused_since(rule(keep_last=1, delete_untagged_after="7d"), NOW) == UnusedSince(week, week, week)
    pulled = rule(keep_pulled_within="14d", delete_untagged_after="7d")
    assert unused_since(pulled, NOW) == UnusedSince(week, week, fortnight)


def test_a_tag_that_belongs_to_a_manifest_stays_with_it() -> None:
    """The name of a cosign signature's tag has the digest of the signed manifest. Such a tag is kept as long as this
    manifest exists, and deleted after that. `keep_last` does not keep it."""
    subject = digest_of(b"signed")
    signature = tag_facts(f"sha256-{subject.encoded}.sig", pushed=0)
    assert decide(rule(keep_last=5), replace(signature, subject=subject), NOW, oldest_kept=None).is_kept
    assert not decide(rule(keep_last=5), signature, NOW, oldest_kept=None).is_kept
    assert decide(rule(keep_last=5), tag_facts("sha256-of-mine"), NOW, oldest_kept=None).is_kept


def test_the_time_in_which_no_server_ran_does_not_count_for_pulls() -> None:
    """While no server ran, nobody could pull. So a tag stays until pulls were recorded for `keep_pulled_within` without
    one of this tag. The time since a push counts as a whole."""
    pulls_since = NOW - 34 * DAY  # a server ran for 14 of the last 34 days
    conditions = rule(keep_pulled_within="14d")
    decision = decide(conditions, tag_facts(pulled=30), NOW, oldest_kept=None, pulls_since=pulls_since)
    assert decision == Decision(True, "pulled within 14d, not counting the times when no server ran")
    assert not decide(conditions, tag_facts(pulled=35), NOW, oldest_kept=None, pulls_since=pulls_since).is_kept
    facts = replace(tag_facts(pushed=50), unrecorded_until=NOW - 30 * DAY)
    assert decide(conditions, facts, NOW, oldest_kept=None, pulls_since=pulls_since).is_kept
    pushed_rule = rule(keep_pushed_within="14d")
    assert not decide(pushed_rule, tag_facts(pushed=30), NOW, oldest_kept=None, pulls_since=pulls_since).is_kept


def test_the_time_in_which_no_server_ran_does_not_count_for_untagged_manifests() -> None:
    """An untagged manifest stays until pulls were recorded for `delete_untagged_after`, or `keep_pulled_within` if that
    is longer, without one of this manifest."""
    off_for_20_days = RecordedPeriods([(0.0, NOW - 21 * DAY), (NOW - DAY, NOW)])
    since = unused_since(rule(delete_untagged_after="7d", keep_pulled_within="2d"), NOW, off_for_20_days)
    assert since == UnusedSince(pushed=NOW - 7 * DAY, untagged=NOW - 7 * DAY, pulled=NOW - 27 * DAY)
    since = unused_since(rule(delete_untagged_after="7d", keep_pulled_within="14d"), NOW, off_for_20_days)
    assert since == UnusedSince(pushed=NOW - 7 * DAY, untagged=NOW - 7 * DAY, pulled=NOW - 34 * DAY)
