"""The probe of the registry's address: it names the reason why there was no response."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from registry.cli.diagnosis.probe import ProbeError, probe
from tests.fakes.certificate_authority import CertificateAuthority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority(tmp_path_factory.mktemp("authority"))


@contextmanager
def serving(context: ssl.SSLContext) -> Iterator[str]:
    """Accepts one connection on a free port, makes the TLS handshake and closes the connection. Yields the URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)

        def accept() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError), context.wrap_socket(connection, server_side=True):
                pass

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def required_by(authority: CertificateAuthority) -> ssl.SSLContext:
    """Returns the context of a server that requires a client certificate."""
    pair = authority.sign("localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    context.load_verify_locations(authority.certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@pytest.mark.parametrize(
    ("version", "error"),
    [
        (ssl.TLSVersion.TLSv1_3, ProbeError.CLIENT_CERTIFICATE),
        (ssl.TLSVersion.TLSv1_2, ProbeError.TLS_ENDED),
    ],
)
def test_a_server_that_requires_a_client_certificate(
    authority: CertificateAuthority, version: ssl.TLSVersion, error: ProbeError
) -> None:
    """With TLS 1.3, the server says that it requires a client certificate. With TLS 1.2, it only says that the
    handshake has failed. Neither counts as a server without TLS."""
    context = required_by(authority)
    context.maximum_version = version
    with serving(context) as url:
        assert probe(url, authority.certificate).error is error


def test_a_server_that_closes_after_the_handshake(authority: CertificateAuthority) -> None:
    """With TLS 1.3, a server can close the connection without an alert if it requires a client certificate. This does
    not count as an answer to plain HTTP."""
    context = required_by(authority)
    context.verify_mode = ssl.CERT_NONE
    with serving(context) as url:
        assert probe(url, authority.certificate).error is ProbeError.TLS_ENDED


def test_a_server_without_tls() -> None:
    """A server that answers a TLS handshake with text speaks no TLS."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert probe(f"https://127.0.0.1:{listener.getsockname()[1]}").error is ProbeError.NO_TLS
        thread.join()
