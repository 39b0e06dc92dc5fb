"""What all unit tests share."""

from __future__ import annotations

from tests.fakes.small_store import small_store as small_store
