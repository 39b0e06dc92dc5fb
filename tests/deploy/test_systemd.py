"""Tests of the units in deploy/systemd with `systemd-analyze`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.fakes.clients.programs import ForeignProgram, environment
from tests.fakes.server_process import ROOT

UNITS = ROOT / "deploy" / "systemd"


@pytest.fixture
def analyze(tmp_path: Path) -> ForeignProgram:
    return ForeignProgram(("systemd-analyze",), environment(tmp_path / "home"))


def test_the_units_are_valid(analyze: ForeignProgram, tmp_path: Path) -> None:
    """`systemd-analyze verify` reports no problem, such as an unknown setting or a missing program."""
    program = Path(sys.executable).with_name("entrepot")
    names = ["entrepot.service", "entrepot.socket"]
    for name in names:
        text = (UNITS / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/entrepot/bin/entrepot", str(program)))
    assert analyze("verify", "--man=no", *(str(tmp_path / name) for name in names)).text == ""


def test_the_start_has_time_for_a_migration() -> None:
    """systemd does not end a start that migrates the data, however long it takes. The server reports that it is ready
    only after the migration."""
    unit = (UNITS / "entrepot.service").read_text()
    settings = re.findall(r"^(?:Type|TimeoutStartSec)=.*", unit, re.MULTILINE)
    assert settings == ["Type=notify", "TimeoutStartSec=infinity"]


def test_the_service_is_confined(analyze: ForeignProgram) -> None:
    """The exposure level of the service is at most 2. systemd computes this level, from 0 (confined) to 10
    (exposed)."""
    output = analyze("security", "--offline=true", "--no-pager", str(UNITS / "entrepot.service")).out
    (level,) = re.findall(r"Overall exposure level for entrepot\.service: ([0-9.]+)", output)
    assert float(level) <= 2.0
