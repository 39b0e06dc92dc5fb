"""The settings of a running server, read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.cli.live_configuration import LiveConfiguration
from registry.config.settings_sources import load_settings
from registry.server.process.live_change import ChangeRefused
from storage.composition import layout_of, prepare_data_dir


def test_a_store_that_cannot_be_read(tmp_path: Path) -> None:
    """If the store cannot be read, it is not known whether there are accounts, and the change of the settings is
    refused."""
    prepare_data_dir(tmp_path)
    flags = {"data": tmp_path}
    source = LiveConfiguration(load_settings(flags, None).settings, flags, None, bound_to_loopback=True)
    source.propose()
    layout_of(tmp_path).metadata.write_bytes(b"no database" * 1000)
    with pytest.raises(ChangeRefused):
        source.propose()
