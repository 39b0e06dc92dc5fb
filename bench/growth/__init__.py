"""Stores of growing size, and what that does to requests and to the start."""

from __future__ import annotations

from bench.growth.run import Plan, measure

__all__ = ["Plan", "measure"]
