"""What `entrepot serve` logs before it starts the workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.cli.server_preparation import prepare_server
from registry.config import Settings
from storage import running_digest


@pytest.mark.parametrize("can_save", [True, False])
def test_start_of_the_server_warns_if_hashes_of_uploads_cannot_be_saved(
    can_save: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has one warning about it, and none if they can be saved."""
    if not can_save:
        monkeypatch.setattr(running_digest, "_libcrypto_hash", lambda _: None)
    prepare_server(Settings(data=tmp_path / "data"), bound_to_loopback=True, may_migrate=True)
    texts = [record.getMessage() for record in caplog.records if record.name == "registry"]
    assert ["libcrypto.so.3" in text for text in texts] == [True] * (not can_save)
