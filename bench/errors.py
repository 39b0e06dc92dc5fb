"""The exceptions that benchmarks raise."""

from __future__ import annotations


class BenchFailed(Exception):
    """A step of the benchmark failed. The message says why, in one line."""


class TrialFailed(BenchFailed):
    """A trial gave no valid figures: a request failed, or bytes were missing."""
