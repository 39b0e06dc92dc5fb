"""The exception that the making of a release raises."""

from __future__ import annotations


class ReleaseFailed(Exception):
    """A file of the release could not be made, or the version numbers in the source contradict each other. The message
    says why."""
