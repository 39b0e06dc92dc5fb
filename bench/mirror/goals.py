"""What the mirror is to reach."""

from __future__ import annotations

from bench.goals import most, share

GOALS = (
    most("thundering", "sent", "32 clients: upstream sent, x image", 1),
    most("thundering", "gets", "32 clients: manifest GETs upstream", 1),
    share("slow-link", "seconds", "cold pull, 8 MiB/s a request, s", 1 / 5),
    share("paced-link", "seconds", "cold pull, 8 MiB/s a connection, s", 1 / 5),
    share("fast-link", "seconds", "cold pull, unthrottled, s", 1),
    share("warm", "seconds", "warm pull, s", 1),
    most("first-byte", "first", "first byte of a cold blob, ms beyond upstream's", 20),
    most("fill", "headers", "headers of a cold 1 GiB blob, ms beyond upstream's", 20),
    most("hosted-beside-fill", "p99", "hosted manifest p99 beside a fill, ms", 50),
    most("cached-beside-fill", "p99", "mirrored manifest p99 beside a fill, ms", 50),
    most("fill-memory", "growth", "memory growth, 2 GiB with 16 readers, MiB", 32),
)
