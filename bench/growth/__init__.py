"""Stores of growing size, and what that does to requests and to the start."""

from __future__ import annotations

from bench.growth.growth_run import GrowthPlan, measure_growth

__all__ = ["GrowthPlan", "measure_growth"]
