"""What all unit tests share."""

from __future__ import annotations

from tests.fakes.small_reserve import small_reserve as small_reserve
