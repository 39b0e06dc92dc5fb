"""Entrepot as a mirror, beside Debian's docker-registry in proxy mode, both before the same upstream."""

from __future__ import annotations

from bench.mirror.mirror_run import MirrorPlan, chosen_mirror_rows, compare_mirrors

__all__ = ["MirrorPlan", "chosen_mirror_rows", "compare_mirrors"]
