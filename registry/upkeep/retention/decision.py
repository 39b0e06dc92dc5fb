"""Applies a retention rule: decides whether a tag is kept (`decide`), and computes how long an untagged manifest must
have been unused to be deleted (`unused_since`). The functions depend only on their arguments."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from registry.config import RetentionRule, format_duration
from storage.human_text import date_text
from storage.recorded_periods import ALWAYS_RECORDED, RecordedPeriods
from storage.retention import TagFacts, TagPosition, UnusedSince

MIN_UNTAGGED_SECONDS: Final = 3600.0
"""An untagged manifest is kept for at least this time after its last push or pull. A client pushes the manifests of an
index before the index, so these manifests are untagged for a while. If the repository already has one of these
manifests, some clients do not push it again, but only send a HEAD request. This request counts as a pull, so it also
keeps the manifest for this time."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a tag is kept. `reason`: the reason, as text for people."""

    is_kept: bool
    reason: str


def decide(
    rule: RetentionRule,
    tag: TagFacts,
    now: float,
    *,
    oldest_kept: TagPosition | None,
    is_protected: bool = False,
    pulls_since: float | None = None,
) -> Decision:
    """Returns the decision of a rule on a tag. A tag that belongs to a manifest, such as the tag of a signature, stays
    as long as the manifest. Times are in seconds since 1970.

    - `now`: the time of the decision.
    - `oldest_kept`: the position of the oldest tag that `rule.keep_last` keeps. None: the repository has fewer than
      `rule.keep_last` tags, so `rule.keep_last` keeps all of them.
    - `is_protected`: the tag is immutable, so it is never deleted.
    - `pulls_since`: a pull at or after this time keeps the tag; the result of `RecordedPeriods.start_of_window`. None:
      `now` minus `rule.keep_pulled_within`, which is right only if a server ran all the time."""
    if is_protected:
        return Decision(True, "it is immutable")
    if tag.subject is not None:
        return Decision(True, f"belongs to {tag.subject}, which is here")
    if rule.keep_last and not tag.is_referrer and (oldest_kept is None or oldest_kept.is_same_or_older_than(tag)):
        return Decision(True, f"one of the newest {rule.keep_last}")
    for pattern in rule.keep_tags:
        if fnmatchcase(tag.name, pattern):
            return Decision(True, f"matches {pattern}")
    if rule.keep_pushed_within and now - tag.pushed <= rule.keep_pushed_within:
        return Decision(True, f"pushed within {format_duration(rule.keep_pushed_within)}")
    if rule.keep_pushed_within and tag.imported is not None and now - tag.imported <= rule.keep_pushed_within:
        # For an imported tag, `pushed` is the time of the tag at the other registry, where this rule did not apply. So
        # the time of the import counts as well.
        return Decision(True, f"imported within {format_duration(rule.keep_pushed_within)}")
    if rule.keep_pulled_within and (reason := _pull_reason(rule.keep_pulled_within, tag, now, pulls_since)):
        return Decision(True, reason)
    not_newest = f"not one of the newest {rule.keep_last}, " if rule.keep_last else ""
    pull_text = "never pulled"
    if tag.pulled is not None:
        pull_text = f"last pulled {date_text(tag.pulled)}"
    elif tag.unrecorded_until is not None:  # some pulls before this time may not be recorded
        pull_text = f"not pulled since {date_text(tag.unrecorded_until)}"
    return Decision(False, f"{not_newest}pushed {date_text(tag.pushed)}, {pull_text}")


def _pull_reason(within: float, tag: TagFacts, now: float, pulls_since: float | None) -> str | None:
    """Returns the reason to keep the tag if it was pulled, or may have been pulled, within the last `within` seconds.
    Otherwise returns None. `pulls_since`: as for `decide`."""
    start = now - within if pulls_since is None else pulls_since
    within_text = format_duration(within)
    if tag.pulled is not None and tag.pulled >= start:
        has_gap = now - tag.pulled > within
        return f"pulled within {within_text}" + (", not counting the times when no server ran" if has_gap else "")
    if tag.unrecorded_until is not None and tag.unrecorded_until >= start:
        before = f"not all pulls before {date_text(tag.unrecorded_until)} are recorded"
        return f"may have been pulled within {within_text}: {before}"
    return None


def unused_since(rule: RetentionRule, now: float, recorded: RecordedPeriods = ALWAYS_RECORDED) -> UnusedSince | None:
    """Returns the times since which an untagged manifest must be unused, so that the rule deletes it at the time `now`.
    Returns None if the rule deletes no untagged manifests. `recorded`: the periods in which a server recorded pulls.
    Only these periods count for pulls, because nobody can pull while no server runs."""
    if rule.delete_untagged_after is None:
        return None
    unused_seconds = rule.delete_untagged_after
    return UnusedSince(
        pushed=now - max(unused_seconds, MIN_UNTAGGED_SECONDS),
        untagged=now - unused_seconds,
        pulled=recorded.start_of_window(max(unused_seconds, rule.keep_pulled_within, MIN_UNTAGGED_SECONDS), now),
    )
