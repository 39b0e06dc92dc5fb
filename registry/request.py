"""A word to the client beside the answer: what it gets may be outdated, and why."""

from __future__ import annotations

from contextvars import ContextVar

NOTICE: ContextVar[str | None] = ContextVar("notice", default=None)
"""What the request being answered is told, in plain ASCII; HTTP sends it as `Warning: 299` (RFC 7234, 5.5)."""


def set_notice(text: str) -> None:
    """The request that is being answered here is told `text`."""
    NOTICE.set(text)
