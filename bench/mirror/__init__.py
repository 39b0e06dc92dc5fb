"""Entrepot as a mirror, beside Debian's docker-registry in proxy mode, both before the same upstream."""

from __future__ import annotations

from bench.mirror.run import Plan, chosen, compare

__all__ = ["Plan", "chosen", "compare"]
