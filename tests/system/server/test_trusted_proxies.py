"""Tests of the `X-Forwarded-*` headers of reverse proxies: the server uses them only if the request comes from a
trusted proxy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.client_addresses import network_of, plain_address
from registry.server.gate.trusted_proxies import MAX_FORWARDED_ADDRESSES, TrustedProxies
from tests.fakes.instruction_count import count_instructions
from tests.system.server.app_process import AppProcess, read_response

# Headers with which a client may try to forge its address.
FORGED = {
    "X-Forwarded-For": "192.0.2.1",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "evil.example",
    "Forwarded": "for=192.0.2.1;proto=https;host=evil.example",
}


@pytest.fixture(scope="module")
def proxied() -> Iterator[AppProcess]:
    """A server for which every client on this machine is a trusted proxy."""
    running = AppProcess({"proxies": ["127.0.0.0/8", "10.0.0.0/8", "2001:db8::/32"]})
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


def ask(running: AppProcess, *lines: str) -> dict[str, Any]:
    """Sends a request with these header lines. Returns what the application has received."""
    head = "\r\n".join(["GET /echo HTTP/1.1", "Host: test", *lines])
    with running.connect() as sock:
        sock.sendall(f"{head}\r\n\r\n".encode("latin-1"))
        status, _, body = read_response(sock)
    assert status == 200
    return dict(json.loads(body))


def test_headers_are_ignored_without_trusted_proxies(server: AppProcess) -> None:
    """If no trusted proxies are configured, the server ignores the headers."""
    received = ask(server, *(f"{name}: {value}" for name, value in FORGED.items()))
    assert (received["client"], received["scheme"], received["host"]) == ("127.0.0.1", "http", ["test"])


def test_headers_of_an_untrusted_peer_are_ignored() -> None:
    """The server ignores the headers of a client whose address is outside the trusted networks."""
    running = AppProcess({"proxies": ["10.0.0.0/8"]})
    try:
        received = ask(running.wait_until_ready(), *(f"{name}: {value}" for name, value in FORGED.items()))
    finally:
        running.close()
    assert (received["client"], received["scheme"], received["host"]) == ("127.0.0.1", "http", ["test"])


def test_headers_of_a_trusted_proxy_are_used(proxied: AppProcess) -> None:
    """The client address, scheme and host are those in the `X-Forwarded-*` headers of the trusted proxy. The header
    `Forwarded` is ignored."""
    lines = ["X-Forwarded-For: 192.0.2.7", "X-Forwarded-Proto: https", "X-Forwarded-Host: registry.example:5000"]
    received = ask(proxied, *lines, "Forwarded: for=192.0.2.99;proto=http;host=evil.example")
    assert (received["client"], received["scheme"], received["host"]) == (
        "192.0.2.7",
        "https",
        ["registry.example:5000"],
    )


def test_headers_apply_to_one_request_only(proxied: AppProcess) -> None:
    """The headers of one request do not apply to the next request on the same connection."""
    first = b"GET /echo HTTP/1.1\r\nHost: test\r\nX-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: https\r\n\r\n"
    with proxied.connect() as sock:
        sock.sendall(first + b"GET /echo HTTP/1.1\r\nHost: test\r\n\r\n")
        received = [json.loads(read_response(sock)[2]) for _ in range(2)]
    assert [(each["client"], each["scheme"]) for each in received] == [("192.0.2.7", "https"), ("127.0.0.1", "http")]


# The lines of X-Forwarded-For in a request from 127.0.0.1, and the client address that the server finds.
CLIENTS = [
    (["192.0.2.1"], "192.0.2.1"),
    (["6.6.6.6, 192.0.2.1"], "192.0.2.1"),  # the client forged the first address
    (["6.6.6.6", "192.0.2.1"], "192.0.2.1"),
    (["192.0.2.1, 10.0.0.1, 10.9.9.9"], "192.0.2.1"),
    (["192.0.2.1 ,10.0.0.1"], "192.0.2.1"),
    (["10.0.0.1"], "10.0.0.1"),  # only trusted proxies are named
    (["6.6.6.6, 2001:db8::5"], "6.6.6.6"),
    (["192.0.2.1:4711"], "192.0.2.1"),
    (["[2001:470::1]:4711"], "2001:470::1"),
    (["2001:470:0::1"], "2001:470::1"),
    (["::ffff:192.0.2.1"], "192.0.2.1"),
    ([""], "127.0.0.1"),
    (["unknown"], "127.0.0.1"),
    (["192.0.2.1, unknown"], "127.0.0.1"),
    (["6.6.6.6, unknown, 10.0.0.1"], "10.0.0.1"),
    (["fe80::1%x address=6.6.6.6"], "127.0.0.1"),
    (["192.0.2.1, "], "127.0.0.1"),
    (["0300.0.2.1"], "127.0.0.1"),
    (["192.0.2.1\xff"], "127.0.0.1"),
]


@pytest.mark.parametrize(("lines", "client"), CLIENTS)
def test_the_client_behind_proxies(proxied: AppProcess, lines: list[str], client: str) -> None:
    """The server searches X-Forwarded-For from the right for the first address that is not a trusted proxy, and uses it
    as the client address. At a malformed address the search ends, and the server uses the address that it found
    before."""
    assert ask(proxied, *(f"X-Forwarded-For: {line}" for line in lines))["client"] == client


@pytest.mark.parametrize(
    ("header", "scheme"),
    [("https", "https"), ("HTTPS", "https"), ("http", "http"), ("http, https", "https"), ("wss", "http"), ("", "http")],
)
def test_the_scheme(proxied: AppProcess, header: str, scheme: str) -> None:
    """The scheme is the last value in X-Forwarded-Proto if this is http or https. Other values are ignored."""
    assert ask(proxied, f"X-Forwarded-Proto: {header}")["scheme"] == scheme


@pytest.mark.parametrize(
    ("header", "host"),
    [("r.example", "r.example"), ("evil, r.example", "r.example"), ("a b", "test"), ("a/b", "test"), ("", "test")],
)
def test_the_host(proxied: AppProcess, header: str, host: str) -> None:
    """The host is the last value in X-Forwarded-Host. An invalid value is ignored."""
    assert ask(proxied, f"X-Forwarded-Host: {header}")["host"] == [host]


@given(st.lists(st.binary(max_size=30), max_size=4))
def test_any_header_value_gives_a_valid_client_and_scheme(values: list[bytes]) -> None:
    """Whatever bytes the headers contain, the client stays an IP address, and the scheme is http or https."""
    scope: dict[str, Any] = {"client": ("127.0.0.1", 1), "scheme": "http"}
    names = (b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host")
    headers = [(name, value) for value in values for name in names]
    TrustedProxies([ip_network("127.0.0.0/8")]).apply(scope, headers)
    assert scope["scheme"] in ("http", "https")
    assert all(letter in "0123456789abcdef.:" for letter in scope["client"][0])


def test_trusted_networks() -> None:
    """An IPv4 address in IPv6 notation (`::ffff:10.1.2.3`) is treated as the IPv4 address. Text that is not an address
    is never trusted."""
    proxies = TrustedProxies([ip_network("10.0.0.0/8"), ip_network("fd00::/8")])
    assert proxies.trusts("10.1.2.3")
    assert proxies.trusts("::ffff:10.1.2.3")
    assert proxies.trusts("fd12::1")
    assert not proxies.trusts("11.1.2.3")
    assert not proxies.trusts("::ffff:11.1.2.3")
    assert not proxies.trusts("")
    assert not proxies.trusts("10.1.2.3, 10.1.2.3")


@pytest.mark.parametrize("address", [b"10.1.1.1", b"fd00::1"])
def test_cost_of_a_long_list_of_proxies_is_limited(address: bytes) -> None:
    """Of X-Forwarded-For, only a limited number of addresses is read. A trusted peer that sends thousands of trusted
    addresses does not block the event loop."""
    proxies = TrustedProxies([ip_network("10.0.0.0/8"), ip_network("fd00::/8")])
    totals = []
    for count in (MAX_FORWARDED_ADDRESSES, 100 * MAX_FORWARDED_ADDRESSES):
        scope: dict[str, Any] = {}
        with count_instructions() as instructions:
            proxies.apply(scope, [(b"x-forwarded-for", b",".join([address] * count))])
        assert scope["client"][0] == address.decode()
        totals.append(instructions.total)
    assert totals[0] == totals[1]


def test_addresses() -> None:
    """IPv6 addresses are grouped by their first 64 bits. IPv4 addresses are not grouped, even in IPv6 notation."""
    assert plain_address("::ffff:192.0.2.1") == "192.0.2.1"
    assert plain_address("::ffff:1") == "::ffff:1"
    assert plain_address("192.0.2.1") == "192.0.2.1"
    assert network_of("192.0.2.1") == "192.0.2.1"
    assert network_of("2001:db8::1") == network_of("2001:db8:0:0:ffff::2") == "2001:db8::/64"
    assert network_of("2001:db8:0:1::1") != network_of("2001:db8::1")
    assert network_of("") == ""
    assert network_of("a:b") == "a:b"
