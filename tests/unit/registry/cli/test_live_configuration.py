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
    configuration = LiveConfiguration(load_settings(flags, None).settings, flags, None, (), bound_to_loopback=True)
    configuration.propose()  # succeeds while the store can be read
    layout_of(tmp_path).metadata.write_bytes(b"no database" * 1000)
    with pytest.raises(ChangeRefused):
        configuration.propose()


@pytest.mark.parametrize(
    ("listen", "metrics", "how"),
    [
        ("0.0.0.0:5000", "127.0.0.1:9100", "listen takes effect only if you stop the server and start it again"),
        ("127.0.0.1:5000", ":9100", "metrics.listen takes effect only if you stop the server and start it again"),
        ("127.0.0.2:5000", "127.0.0.1:9100", "listen takes effect only at a restart: run `entrepot restart`"),
        ("0.0.0.0:5001", "127.0.0.1:9100", "listen takes effect only at a restart: run `entrepot restart`"),
        ("nonsense", "127.0.0.1:9100", "listen takes effect only at a restart: run `entrepot restart`"),
    ],
)
def test_a_changed_address_takes_effect_at_a_restart_or_a_start(
    tmp_path: Path, listen: str, metrics: str, how: str
) -> None:
    """If the new address overlaps one on which the server listens, a restart cannot open it, so the message asks for a
    start. Otherwise it asks for a restart."""
    prepare_data_dir(tmp_path)
    used = ("127.0.0.1:5000", "127.0.0.1:9100")
    file = tmp_path / "settings.toml"
    flags = {"data": tmp_path}
    file.write_text(f'listen = "{used[0]}"\n[metrics]\nlisten = "{used[1]}"\n')
    configuration = LiveConfiguration(load_settings(flags, file).settings, flags, file, used, bound_to_loopback=True)
    file.write_text(f'listen = "{listen}"\n[metrics]\nlisten = "{metrics}"\n')
    with pytest.raises(ChangeRefused) as refused:
        configuration.propose()
    assert how in str(refused.value)
