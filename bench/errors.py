"""What can go wrong in a measurement."""

from __future__ import annotations


class BenchFailed(Exception):
    """Nothing can be measured; the message says why, in one line."""


class TrialFailed(Exception):
    """One trial gave no figures that count: a request failed, or bytes were missing."""
