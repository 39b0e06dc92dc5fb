"""`registry_address` returns the address at which clients reach the registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.clients.registry_address import RegistryAddress, listens_everywhere, registry_address
from registry.config import Settings, TLSSettings


@pytest.mark.parametrize(
    ("listen", "everywhere", "host"),
    [
        ("127.0.0.1:5000", False, "127.0.0.1:5000"),
        ("registry.example.com:443", False, "registry.example.com:443"),
        ("[::1]:5000", False, "[::1]:5000"),
        ("0.0.0.0:5000", True, "localhost:5000"),
        ("[::]:5000", True, "localhost:5000"),
        (":5000", True, "localhost:5000"),
        ("*:5000", True, "localhost:5000"),
    ],
)
def test_the_address_in_listen(listen: str, everywhere: bool, host: str) -> None:
    """A wildcard address in `listen` becomes `localhost`. Any other address is used without a change."""
    settings = Settings(listen=listen)
    assert listens_everywhere(settings) is everywhere
    assert registry_address(settings) == RegistryAddress(f"http://{host}")
    assert registry_address(settings).host == host


def test_public_url_is_the_address() -> None:
    """If `public_url` is set, clients use it, whatever the server listens on."""
    settings = Settings(listen="0.0.0.0:5000", public_url="https://registry.example.com")
    address = registry_address(settings)
    assert (address.url, address.host) == ("https://registry.example.com", "registry.example.com")
    assert not address.is_plain_http


def test_tls_changes_the_scheme() -> None:
    """If the settings name a certificate, the address begins with https."""
    assert registry_address(Settings()).is_plain_http
    settings = Settings(tls=TLSSettings(certificate=Path("cert.pem")))
    assert registry_address(settings).url == "https://127.0.0.1:5000"
