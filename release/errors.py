"""The error of a release."""

from __future__ import annotations


class ReleaseFailed(Exception):
    """A file of the release could not be made, or its parts contradict each other. The message says why."""
