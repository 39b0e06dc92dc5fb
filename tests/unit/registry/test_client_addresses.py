"""Checks whether an address or a host name means the local machine."""

from __future__ import annotations

import pytest

from registry.client_addresses import is_loopback_address, is_loopback_host


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "::1"])
def test_loopback(address: str) -> None:
    """Every address of the loopback networks is a loopback address."""
    assert is_loopback_address(address)
    assert is_loopback_host(address)


@pytest.mark.parametrize("address", ["", "192.0.2.1", "2001:db8::1", "localhost.example.com", "127.0.0.1.example.com"])
def test_not_loopback(address: str) -> None:
    """Other addresses, and host names that only begin like a loopback address, are not loopback addresses."""
    assert not is_loopback_address(address)
    assert not is_loopback_host(address)


def test_localhost_is_a_loopback_host() -> None:
    """`localhost` is a loopback host, but not a loopback address."""
    assert not is_loopback_address("localhost")
    assert is_loopback_host("localhost")
