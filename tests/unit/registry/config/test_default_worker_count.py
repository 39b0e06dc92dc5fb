"""The default of the setting `workers`."""

from __future__ import annotations

import os

import pytest

from registry.config import Settings


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (3, 3), (4, 4), (64, 4)])
def test_one_worker_for_each_usable_core(monkeypatch: pytest.MonkeyPatch, cores: int, workers: int) -> None:
    """By default, there is one worker for each core that the process may use, but at most four."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert Settings().workers == workers
    assert Settings(workers=7).workers == 7
