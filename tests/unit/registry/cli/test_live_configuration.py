"""`LiveConfiguration` reads the settings of a running server again."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.cli.live_configuration import LiveConfiguration
from registry.config.settings_sources import load_settings
from registry.server.process.live_change import ChangeRefused
from storage.composition import layout_of, prepare_data_dir


def test_a_change_is_refused_if_the_store_cannot_be_read(tmp_path: Path) -> None:
    """`propose` reads the settings again, and raises ChangeRefused if the server must not use them. If the store cannot
    be read, the server cannot tell whether there are accounts, so it refuses all changes of the settings."""
    prepare_data_dir(tmp_path)
    flags = {"data": tmp_path}
    configuration = LiveConfiguration(load_settings(flags, None).settings, flags, None, bound_to_loopback=True)
    configuration.propose()  # succeeds while the store can be read
    layout_of(tmp_path).metadata.write_bytes(b"no database" * 1000)
    with pytest.raises(ChangeRefused):
        configuration.propose()
