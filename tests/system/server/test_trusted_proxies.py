"""Headers of reverse proxies, and when they count."""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.client_addresses import network_of, plain_address
from registry.server.gate.trusted_proxies import TrustedProxies
from tests.system.server.app_process import AppProcess, read_response

FORGED = {
    "X-Forwarded-For": "192.0.2.1",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "evil.example",
    "Forwarded": "for=192.0.2.1;proto=https;host=evil.example",
}


@pytest.fixture(scope="module")
def proxied() -> Iterator[AppProcess]:
    """A server that trusts every client on this machine."""
    running = AppProcess({"proxies": ["127.0.0.0/8", "10.0.0.0/8", "2001:db8::/32"]})
    try:
        yield running.until_ready()
    finally:
        running.close()


def ask(running: AppProcess, *lines: str) -> dict[str, Any]:
    head = "\r\n".join(["GET /echo HTTP/1.1", "Host: test", *lines])
    with running.connect() as sock:
        sock.sendall(f"{head}\r\n\r\n".encode("latin-1"))
        status, _, body = read_response(sock)
    assert status == 200
    return dict(json.loads(body))


def test_nobody_is_believed_unasked(server: AppProcess) -> None:
    """Without trusted proxies the headers are ignored."""
    seen = ask(server, *(f"{name}: {value}" for name, value in FORGED.items()))
    assert (seen["client"], seen["scheme"], seen["host"]) == ("127.0.0.1", "http", ["test"])


def test_a_peer_that_is_no_proxy() -> None:
    """From an address outside the trusted networks the headers are ignored."""
    running = AppProcess({"proxies": ["10.0.0.0/8"]})
    try:
        seen = ask(running.until_ready(), *(f"{name}: {value}" for name, value in FORGED.items()))
    finally:
        running.close()
    assert (seen["client"], seen["scheme"], seen["host"]) == ("127.0.0.1", "http", ["test"])


def test_a_trusted_proxy(proxied: AppProcess) -> None:
    """Client, scheme and host are those that the proxy sends; `Forwarded` is ignored."""
    lines = ["X-Forwarded-For: 192.0.2.7", "X-Forwarded-Proto: https", "X-Forwarded-Host: registry.example:5000"]
    seen = ask(proxied, *lines, "Forwarded: for=192.0.2.99;proto=http;host=evil.example")
    assert (seen["client"], seen["scheme"], seen["host"]) == ("192.0.2.7", "https", ["registry.example:5000"])


def test_requests_of_one_connection_are_told_apart(proxied: AppProcess) -> None:
    """The headers of one request do not apply to the next request on the same connection."""
    first = b"GET /echo HTTP/1.1\r\nHost: test\r\nX-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Proto: https\r\n\r\n"
    with proxied.connect() as sock:
        sock.sendall(first + b"GET /echo HTTP/1.1\r\nHost: test\r\n\r\n")
        seen = [json.loads(read_response(sock)[2]) for _ in range(2)]
    assert [(each["client"], each["scheme"]) for each in seen] == [("192.0.2.7", "https"), ("127.0.0.1", "http")]


CLIENTS = [
    (["192.0.2.1"], "192.0.2.1"),
    (["6.6.6.6, 192.0.2.1"], "192.0.2.1"),  # the client wrote the first itself
    (["6.6.6.6", "192.0.2.1"], "192.0.2.1"),
    (["192.0.2.1, 10.0.0.1, 10.9.9.9"], "192.0.2.1"),
    (["192.0.2.1 ,10.0.0.1"], "192.0.2.1"),
    (["10.0.0.1"], "10.0.0.1"),  # nobody before our own proxies
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
    """The client is, from the right, the first address that is not a trusted proxy's; a malformed address ends the
    search."""
    assert ask(proxied, *(f"X-Forwarded-For: {line}" for line in lines))["client"] == client


@pytest.mark.parametrize(
    ("said", "scheme"),
    [("https", "https"), ("HTTPS", "https"), ("http", "http"), ("http, https", "https"), ("wss", "http"), ("", "http")],
)
def test_the_scheme(proxied: AppProcess, said: str, scheme: str) -> None:
    """It is http or https, as the nearest proxy says; other values change nothing."""
    assert ask(proxied, f"X-Forwarded-Proto: {said}")["scheme"] == scheme


@pytest.mark.parametrize(
    ("said", "host"),
    [("r.example", "r.example"), ("evil, r.example", "r.example"), ("a b", "test"), ("a/b", "test"), ("", "test")],
)
def test_the_host(proxied: AppProcess, said: str, host: str) -> None:
    """The last valid host counts."""
    assert ask(proxied, f"X-Forwarded-Host: {said}")["host"] == [host]


@given(st.lists(st.binary(max_size=30), max_size=4))
def test_anything_at_all(values: list[bytes]) -> None:
    """Whatever the headers contain, the client is an address and the scheme one of two."""
    scope: dict[str, Any] = {"client": ("127.0.0.1", 1), "scheme": "http"}
    names = (b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host")
    headers = [(name, value) for value in values for name in names]
    TrustedProxies([ip_network("127.0.0.0/8")]).apply(scope, headers)
    assert scope["scheme"] in ("http", "https")
    assert all(letter in "0123456789abcdef.:" for letter in scope["client"][0])


def test_trust() -> None:
    """An IPv4 client on an IPv6 socket is the same as on an IPv4 socket; text that is no address is never trusted."""
    proxies = TrustedProxies([ip_network("10.0.0.0/8"), ip_network("fd00::/8")])
    assert proxies.trusts("10.1.2.3")
    assert proxies.trusts("::ffff:10.1.2.3")
    assert proxies.trusts("fd12::1")
    assert not proxies.trusts("11.1.2.3")
    assert not proxies.trusts("::ffff:11.1.2.3")
    assert not proxies.trusts("")
    assert not proxies.trusts("10.1.2.3, 10.1.2.3")


def test_addresses() -> None:
    """An IPv6 address counts by its first 64 bits, an IPv4 address as a whole, also on an IPv6 socket."""
    assert plain_address("::ffff:192.0.2.1") == "192.0.2.1"
    assert plain_address("::ffff:1") == "::ffff:1"
    assert plain_address("192.0.2.1") == "192.0.2.1"
    assert network_of("192.0.2.1") == "192.0.2.1"
    assert network_of("2001:db8::1") == network_of("2001:db8:0:0:ffff::2") == "2001:db8::/64"
    assert network_of("2001:db8:0:1::1") != network_of("2001:db8::1")
    assert network_of("") == ""
    assert network_of("a:b") == "a:b"
