from __future__ import annotations

import socket
from contextlib import closing

import pytest

from registry.server.gate.listener import ListenError, address_of, bind


def test_free_port() -> None:
    """Port 0 takes a free port, whose number is known and which accepts connections at once."""
    with closing(bind("127.0.0.1:0")) as sock:
        host, _, port = address_of(sock).rpartition(":")
        assert host == "127.0.0.1"
        socket.create_connection((host, int(port))).close()


def test_port_in_use() -> None:
    """The error for a port in use says in one line what to do."""
    with closing(bind("127.0.0.1:0")) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ListenError, match=rf"in use .*--listen 127.0.0.1:{port % 65535 + 1}") as caught:
            bind(f"127.0.0.1:{port}")
        assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "text", ["", "5000", "localhost", "a:b", "127.0.0.1:70000", "::1:5000", "[::1]", "http://a:80", "a b:1", ":-1"]
)
def test_bad_text(text: str) -> None:
    """Text that is not HOST:PORT is refused with an example."""
    with pytest.raises(ListenError, match="HOST:PORT"):
        bind(text)


def test_unknown_host() -> None:
    """The error names a host without an address."""
    with pytest.raises(ListenError, match=r"no\.such\.host\.invalid"):
        bind("no.such.host.invalid:5000")


def test_foreign_address() -> None:
    """The error for another machine's address says how to listen on all local ones."""
    with pytest.raises(ListenError, match=r"no such address.*0\.0\.0\.0:5000"):
        bind("192.0.2.1:5000")


def test_ipv6_is_bracketed() -> None:
    """An IPv6 address is printed with brackets, as it is typed."""
    with socket.socket(socket.AF_INET6) as sock:
        try:
            sock.bind(("::1", 0))
        except OSError:  # a machine without IPv6: the refusal is what can be seen there
            with pytest.raises(ListenError, match="cannot listen on"):
                bind("[::1]:0")
            return
    with closing(bind("[::1]:0")) as bound:
        assert address_of(bound).startswith("[::1]:")
