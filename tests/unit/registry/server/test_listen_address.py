"""The address at which the server listens, and the errors if it cannot listen there."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest

from registry.server.gate.listener import ListenError, address_of, bind, overlaps


def test_free_port() -> None:
    """If the port is 0, the server listens on a free port. The number of this port is known, and the port accepts
    connections at once."""
    with closing(bind("127.0.0.1:0")) as sock:
        host, _, port = address_of(sock).rpartition(":")
        assert host == "127.0.0.1"
        socket.create_connection((host, int(port))).close()


def test_port_in_use() -> None:
    """The error for a port that is in use is one line and suggests another port."""
    with closing(bind("127.0.0.1:0")) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ListenError, match=rf"in use .*--listen 127.0.0.1:{port % 65535 + 1}") as caught:
            bind(f"127.0.0.1:{port}")
        assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "text", ["", "5000", "localhost", "a:b", "127.0.0.1:70000", "::1:5000", "[::1]", "http://a:80", "a b:1", ":-1"]
)
def test_text_of_another_form_is_refused(text: str) -> None:
    """A text that does not have the form HOST:PORT is refused. The error names this form."""
    with pytest.raises(ListenError, match="HOST:PORT"):
        bind(text)


def test_host_without_an_address() -> None:
    """If no address is found for a host, the error names the host."""
    with pytest.raises(ListenError, match=r"no\.such\.host\.invalid"):
        bind("no.such.host.invalid:5000")


def test_address_of_another_machine() -> None:
    """The error for an address of another machine says how to listen on all addresses of this machine."""
    with pytest.raises(ListenError, match=r"no such address.*0\.0\.0\.0:5000"):
        bind("192.0.2.1:5000")


@pytest.mark.parametrize(
    ("listen", "used", "result"),
    [
        ("0.0.0.0:5000", "127.0.0.1:5000", True),
        ("127.0.0.1:5000", ":5000", True),
        ("127.0.0.1:5000", "127.0.0.1:5000", True),
        ("[::]:5000", "127.0.0.1:5000", True),
        ("[::1]:5000", "[::]:5000", True),
        ("127.0.0.2:5000", "127.0.0.1:5000", False),
        ("[::1]:5000", "0.0.0.0:5000", False),
        ("0.0.0.0:5001", "127.0.0.1:5000", False),
        ("0.0.0.0:0", "127.0.0.1:0", False),
        ("0.0.0.0", "127.0.0.1:5000", False),
    ],
)
def test_addresses_that_overlap(listen: str, used: str, result: bool) -> None:
    """Two addresses overlap if they have the same port, and the same host or a host that stands for the other one."""
    assert overlaps(listen, used) is result


def test_ipv6_is_bracketed() -> None:
    """An IPv6 address is printed in brackets, as users type it."""
    with socket.socket(socket.AF_INET6) as sock:
        try:
            sock.bind(("::1", 0))
        except OSError:  # the machine has no IPv6: only the error can be checked
            with pytest.raises(ListenError, match="cannot listen on"):
                bind("[::1]:0")
            return
    with closing(bind("[::1]:0")) as bound:
        assert address_of(bound).startswith("[::1]:")
