"""The settings: one typed model (`Settings`), its groups, and how times and sizes are written in it."""

from registry.config.settings import NESTED, PREFIX, Settings
from registry.config.units import format_duration, format_size, is_duration, parse_duration
from registry.config.upstream import HUB, LIBRARY, Hosted, Upstream, compile_pattern

__all__ = [
    "HUB",
    "LIBRARY",
    "NESTED",
    "PREFIX",
    "Hosted",
    "Settings",
    "Upstream",
    "compile_pattern",
    "format_duration",
    "format_size",
    "is_duration",
    "parse_duration",
]
