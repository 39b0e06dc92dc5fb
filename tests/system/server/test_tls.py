"""Tests of the server with TLS over raw sockets: handshakes, client certificates, bodies in both directions, and the
end of connections. They run with uvloop and with asyncio's event loop."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.certificate_authority import CertificateAuthority, KeyPair
from tests.fakes.temporary_files import disk_folder
from tests.system.server.app_process import AppProcess, Start, read_all, read_error, read_response, wait_for
from tests.system.server.tls_client import GET, ask, client_context, tls_connection

# Environment variables that select the event loop of the server.
LOOPS = [{}, {"NO_UVLOOP": "1"}]
IDS = ["uvloop", "asyncio"]
MIB = 1024 * 1024
RESET_ON_CLOSE = b"\1\0\0\0\0\0\0\0"
"""The value of SO_LINGER with which a socket sends a RST when it is closed: a linger time of 0 s."""
LIMITS = {"handshake_seconds": 60.0, "linger_seconds": 0.3, "timeout_check_seconds": 0.05}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def pair(authority: CertificateAuthority) -> KeyPair:
    return authority.sign("localhost")


@pytest.fixture(scope="module")
def context(authority: CertificateAuthority) -> ssl.SSLContext:
    return client_context(authority.certificate)


@pytest.fixture(scope="module", params=LOOPS, ids=IDS)
def env(request: pytest.FixtureRequest) -> dict[str, str]:
    return dict(request.param)


@pytest.fixture(scope="module")
def tls(env: dict[str, str], pair: KeyPair) -> Iterator[AppProcess]:
    """A server with TLS. Checks that it logs no errors."""
    running = AppProcess({"tls": tls_option(pair), "limits": LIMITS}, env)
    try:
        yield running.wait_until_ready()
        assert running.errors == ""  # no client can make the server log an error
    finally:
        running.close()


@pytest.fixture(scope="module")
def impatient(env: dict[str, str], pair: KeyPair) -> Iterator[AppProcess]:
    """A server whose clients must complete the handshake in half a second."""
    running = AppProcess({"tls": tls_option(pair), "limits": {**LIMITS, "handshake_seconds": 0.5}}, env)
    try:
        yield running.wait_until_ready()
        assert running.errors == ""
    finally:
        running.close()


def tls_option(pair: KeyPair, *more: str) -> list[str]:
    """Returns the option `tls` of the test application: the paths of the certificate and the key, and `more`."""
    return [str(pair.certificate), str(pair.key), *more]


# Handshakes


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_versions_and_ciphers(tls: AppProcess, authority: CertificateAuthority, version: ssl.TLSVersion) -> None:
    """The server supports TLS 1.2 and 1.3, selects HTTP/1.1 by ALPN, and uses a cipher with forward secrecy. The
    application sees the scheme https."""
    context = client_context(authority.certificate)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])
    with tls_connection(tls, context) as sock:
        assert sock.selected_alpn_protocol() == "http/1.1"
        cipher = sock.cipher()
        assert cipher is not None
        assert cipher[0].startswith("TLS_") or (cipher[0].startswith("ECDHE") and "GCM" in cipher[0])
        for _ in range(3):
            received = ask(sock)
            assert (received["scheme"], received["client"]) == ("https", "127.0.0.1")


def test_tls_1_1_is_refused(tls: AppProcess, authority: CertificateAuthority) -> None:
    """The handshake fails for a client that supports only TLS 1.1. The same client succeeds with TLS 1.2."""
    context = client_context(authority.certificate)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionResetError)), tls_connection(tls, context):
        pass
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with tls_connection(tls, context) as sock:
        assert ask(sock)["size"] == 0


@pytest.mark.parametrize("request_", [GET, b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n123456789"])
def test_plain_http(tls: AppProcess, request_: bytes) -> None:
    """A client that sends plain HTTP to the TLS port gets a 400 that explains the mistake."""
    answer = tls.send_and_read_all(request_)
    assert read_error(answer) == (400, "UNSUPPORTED")
    assert b"speaks TLS" in answer


@pytest.mark.parametrize("sent", [b"\x16", b"\x16\x03\x01\x00\x05hello", b"\x00\xff\x00", b"\x16\x03\x01\xff\xff" * 99])
def test_invalid_handshake_closes_the_connection(impatient: AppProcess, sent: bytes) -> None:
    """If a client sends invalid bytes instead of a handshake, the server closes the connection, immediately or at the
    handshake timeout."""
    with impatient.connect_with(sent) as sock, contextlib.suppress(ConnectionResetError):
        read_all(sock)


@pytest.mark.parametrize("count", [0, 1, 100])
def test_disconnect_during_the_handshake_leaks_nothing(tls: AppProcess, context: ssl.SSLContext, count: int) -> None:
    """If a client disconnects during the handshake, the server closes its descriptor, whatever part of the handshake
    was sent."""
    with tls_connection(tls, context) as control:
        descriptors_before = descriptors(control)
        hello = first_flight(context)
        with tls.connect() as sock:
            sock.sendall(hello[:count])
        with tls.connect() as sock:
            sock.sendall(hello)
            sock.recv(1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        wait_for(lambda: descriptors(control) <= descriptors_before)


def test_handshake_timeout(impatient: AppProcess) -> None:
    """The server disconnects a client that sends nothing, and a client that stops in the middle of the handshake."""
    started = time.monotonic()
    with impatient.connect() as silent, impatient.connect_with(b"\x16\x03") as slow:
        for sock in (silent, slow):
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
    assert time.monotonic() - started < 12  # the timeout of a request's head is 15 s


def first_flight(context: ssl.SSLContext) -> bytes:
    """Returns a ClientHello."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def descriptors(sock: ssl.SSLSocket) -> int:
    """Returns how many file descriptors the server has open."""
    sock.sendall(b"GET /descriptors HTTP/1.1\r\nHost: test\r\n\r\n")
    return int(read_response(sock)[2])


# Client certificates


@pytest.mark.parametrize(("mode", "is_served_without"), [("required", False), ("optional", True)])
def test_certificates_of_clients(
    start: Start,
    env: dict[str, str],
    authority: CertificateAuthority,
    pair: KeyPair,
    tmp_path: Path,
    mode: str,
    is_served_without: bool,
) -> None:
    """The server accepts a client certificate of the configured authority, and refuses one of another authority. A
    client without a certificate is served if certificates are optional, and refused if they are required."""
    other_authority = CertificateAuthority(tmp_path)
    tls = tls_option(pair, str(authority.certificate), mode)
    running = start(env, tls=tls)
    trusted_pair, untrusted_pair = authority.sign("client", client=True), other_authority.sign("stranger", client=True)
    assert gets_in(running, client_context(authority.certificate, trusted_pair))
    assert not gets_in(running, client_context(authority.certificate, untrusted_pair))
    assert gets_in(running, client_context(authority.certificate)) == is_served_without
    assert gets_in(running, client_context(authority.certificate, trusted_pair))
    assert running.errors == ""


def gets_in(running: AppProcess, context: ssl.SSLContext) -> bool:
    """Returns whether the client is served. Sends a request, because in TLS 1.3 a client notices only after the
    handshake that its certificate was refused."""
    try:
        with tls_connection(running, context) as sock:
            return bool(ask(sock)["pid"])
    except (ssl.SSLError, ConnectionResetError, BrokenPipeError):
        return False


def test_curl_with_a_certificate(start: Start, authority: CertificateAuthority, pair: KeyPair) -> None:
    """If the server requires client certificates, curl is served with a certificate and refused without one."""
    running = start(tls=tls_option(pair, str(authority.certificate), "required"))
    client_pair = authority.sign("curl", client=True)
    url = f"https://localhost:{running.address[1]}/echo"
    curl = ["curl", "--silent", "--show-error", "--cacert", str(authority.certificate), url]
    certificate_options = ["--cert", str(client_pair.certificate), "--key", str(client_pair.key)]
    process = subprocess.run([*curl, *certificate_options], capture_output=True, timeout=30, check=True)
    assert json.loads(process.stdout)["scheme"] == "https"
    assert subprocess.run(curl, capture_output=True, timeout=30).returncode != 0


# Bodies


@pytest.mark.parametrize("path", ["/digest?keep=1", "/digest", "/digest?copied=1"])
@pytest.mark.parametrize("chunked", [True, False])
def test_large_request_body_over_tls(tls: AppProcess, context: ssl.SSLContext, path: str, chunked: bool) -> None:
    """Every byte of a large body reaches the application, and the connection stays open. The application receives the
    body in views of the server's buffers, or in copies (`copied`). With `keep`, it keeps all views until the end."""
    body = os.urandom(8 * MIB + 77)
    sent_body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    framing_header = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    with tls_connection(tls, context) as sock:
        for _ in range(2):
            result = ask(sock, f"POST {path} HTTP/1.1\r\nHost: test\r\n{framing_header}\r\n\r\n".encode() + sent_body)
            assert result == {"digest": hashlib.sha256(body).hexdigest(), "size": len(body)}


def test_small_tls_records(tls: AppProcess, context: ssl.SSLContext) -> None:
    """A body can arrive in TLS records of a few bytes, and several requests can arrive in one record."""
    with tls_connection(tls, context) as sock:
        sock.sendall(b"POST /digest HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(250):
            sock.sendall(b"abcd")
        assert json.loads(read_response(sock)[2])["digest"] == hashlib.sha256(b"abcd" * 250).hexdigest()
        sock.sendall(GET * 20)
        assert [read_response(sock)[0] for _ in range(20)] == [200] * 20


def test_large_response_over_tls(tls: AppProcess, context: ssl.SSLContext) -> None:
    """A response that the application sends in pieces of 1 MiB arrives completely, and the connection stays open."""
    with tls_connection(tls, context) as sock:
        for size in (64 * MIB + 7, MIB, 1):
            sock.sendall(f"GET /big?size={size} HTTP/1.1\r\nHost: test\r\n\r\n".encode() * 2)
            for _ in range(2):
                assert len(read_response(sock)[2]) == size


def test_streamed_bodies_do_not_count_as_unread_responses(
    start: Start, env: dict[str, str], context: ssl.SSLContext, pair: KeyPair
) -> None:
    """Eight clients do not read streamed responses, such as blobs. Another client still gets its small response, such
    as a manifest, instead of a 503."""
    running = start(env, tls=tls_option(pair), limits={"unsent_bytes": 512 * 1024})
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            sock = stack.enter_context(tls_connection(running, context, buffer=16 * 1024))
            sock.sendall(b"GET /big?size=16777216 HTTP/1.1\r\nHost: test\r\n\r\n")
            assert sock.recv(12)[-3:] == b"200"
        with tls_connection(running, context) as sock:
            sock.sendall(b"GET /whole?size=100000 HTTP/1.1\r\nHost: test\r\n\r\n")
            assert sock.recv(12)[-3:] == b"200"


def test_unread_responses_occupy_little_memory(tls: AppProcess, context: ssl.SSLContext) -> None:
    """Sixteen clients request 1 GiB each and read only one byte. The server buffers less than 3 MiB for each of
    them."""
    with tls_connection(tls, context) as warm_up:
        warm_up.sendall(b"GET /big?size=67108864 HTTP/1.1\r\nHost: test\r\n\r\n")
        read_response(warm_up)
    memory_before = resident(tls)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(tls_connection(tls, context, buffer=64 * 1024)) for _ in range(16)]
        for sock in socks:
            sock.sendall(b"GET /big?size=1073741824 HTTP/1.1\r\nHost: test\r\n\r\n")
        for sock in socks:
            assert sock.recv(1)
        with tls_connection(tls, context) as other_client:
            assert ask(other_client)["size"] == 0
        assert resident(tls) - memory_before < 16 * 3 * MIB
    for _ in socks:
        tls.wait_for_line("cut")


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    """The path of a file of 32 MiB on a real disk."""
    with disk_folder() as folder:
        file = folder / "file"
        file.write_bytes(os.urandom(MIB) * 32)
        yield file


def file_request(path: Path, parts: str, length: int) -> bytes:
    """Returns a request for parts of the file (see `EchoApp.file`), which have `length` bytes together."""
    return f"GET /file?path={path}&parts={parts}&length={length} HTTP/1.1\r\nHost: test\r\n\r\n".encode()


def test_file_over_tls(tls: AppProcess, context: ssl.SSLContext, path: Path) -> None:
    """The parts of a file, and text between them, arrive in the right order. The connection stays open."""
    data = path.read_bytes()
    expected = b"head" + data[:2_000_000] + b"middle" + data[7:8] + data[-300_000:]
    request = file_request(path, f"=head,0-2000000,=middle,7-1,{len(data) - 300_000}-", len(expected))
    with tls_connection(tls, context) as sock:
        sock.sendall(request * 2)  # the second request arrives during the first response
        for _ in range(2):
            assert read_response(sock)[2] == expected
        assert ask(sock)["size"] == 0


def test_files_for_clients_that_do_not_read_occupy_little_memory(
    tls: AppProcess, context: ssl.SSLContext, path: Path
) -> None:
    """Forty clients with small buffers request a file and read only its first byte. The server has at most 400 KiB in
    memory for each of them. When they disconnect, the server closes all descriptors."""
    request = file_request(path, "-", 32 * MIB)
    with tls_connection(tls, context) as control, contextlib.ExitStack() as stack:
        descriptors_before = descriptors(control)
        socks = [stack.enter_context(tls_connection(tls, context, buffer=4096)) for _ in range(40)]
        memory_before = resident(tls)
        for sock in socks:
            sock.sendall(request)
        for sock in socks:
            assert sock.recv(1)
        assert ask(control)["size"] == 0
        assert resident(tls) - memory_before < 40 * 400 * 1024
        stack.close()
        for _ in socks:
            tls.wait_for_line("cut ClientDisconnected")
        wait_for(lambda: descriptors(control) <= descriptors_before)


def resident(running: AppProcess) -> int:
    """Returns the resident memory of the process in bytes."""
    with open(f"/proc/{running.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("reset", [True, False])
def test_disconnect_is_reported_to_the_application(tls: AppProcess, context: ssl.SSLContext, reset: bool) -> None:
    """If the client disconnects in the middle of a response or of a request body, the application gets an error or a
    disconnect message."""
    with tls_connection(tls, context) as sock:
        sock.sendall(b"GET /big?size=1073741824 HTTP/1.1\r\nHost: test\r\n\r\n")
        sock.recv(100_000)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    tls.wait_for_line("cut")
    with tls_connection(tls, context) as sock:
        sock.sendall(b"POST /patient HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\nabc")
        tls.wait_for_line("patient")
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    tls.wait_for_line("left")


def test_close_notify(tls: AppProcess, context: ssl.SSLContext) -> None:
    """If a client sends close_notify in the middle of a request body, the application gets a disconnect message."""
    with tls_connection(tls, context) as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\nabc")
        with contextlib.suppress(OSError):
            sock.unwrap()
        tls.wait_for_line("disconnected")


def test_last_response_ends_with_close_notify(tls: AppProcess, context: ssl.SSLContext) -> None:
    """After `Connection: close`, a response of any size arrives completely, followed by close_notify."""
    for size in (10, 5 * MIB):
        with tls_connection(tls, context, buffer=64 * 1024) as sock:
            sock.sendall(f"GET /big?size={size} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
            data = bytearray()
            while piece := sock.recv(65536):  # raises if the connection ends without close_notify
                data += piece
            assert len(data.partition(b"\r\n\r\n")[2]) == size


def test_refusal_while_the_client_sends_the_body(tls: AppProcess, context: ssl.SSLContext) -> None:
    """The application answers 403 without reading the body. The client gets this response although it continues to send
    the body."""
    with tls_connection(tls, context) as sock:
        sock.sendall(b"POST /refuse HTTP/1.1\r\nHost: test\r\nContent-Length: 100000000\r\n\r\n")
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            for _ in range(10):
                sock.sendall(bytes(100_000))
        status, headers, _ = read_response(sock)
        assert (status, headers["connection"]) == (403, "close")


# Slow clients and the end of the server


def test_client_that_reads_nothing_is_disconnected(
    start: Start, env: dict[str, str], context: ssl.SSLContext, pair: KeyPair
) -> None:
    """The server disconnects a client that reads nothing for the timeout, but not a client that reads a few bytes again
    and again."""
    limits = {"send_idle_seconds": 1.0, "timeout_check_seconds": 0.05}
    running = start(env, tls=tls_option(pair), limits=limits)
    request = b"GET /big?size=1073741824 HTTP/1.1\r\nHost: test\r\n\r\n"
    with (
        tls_connection(running, context, buffer=64 * 1024) as slow,
        tls_connection(running, context, buffer=64 * 1024) as stuck,
    ):
        slow.sendall(request)
        assert slow.recv(1)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            assert slow.recv(16 * 1024)
            time.sleep(0.05)  # the pace of the slow client
        stuck.sendall(request)
        running.wait_for_line("cut")


@pytest.mark.parametrize("workers", [1, 2])
def test_stop_waits_only_for_responses_in_progress(
    start: Start, env: dict[str, str], context: ssl.SSLContext, pair: KeyPair, workers: int
) -> None:
    """On SIGTERM, the server completes the response in progress. It does not wait for idle connections, or for clients
    that have not started their handshake."""
    running = start(env, tls=tls_option(pair), workers=workers, grace=30)
    with (
        tls_connection(running, context) as idle,
        running.connect() as silent,
        tls_connection(running, context) as sock,
    ):
        ask(idle)
        sock.sendall(b"GET /slow?seconds=0.5 HTTP/1.1\r\nHost: test\r\n\r\n")
        running.wait_for_line("slow")
        started = time.monotonic()
        os.kill(running.pid, signal.SIGTERM)
        assert read_response(sock)[2] == b"slow"
        assert running.wait_for_exit() == 0
        assert time.monotonic() - started < 10
        with contextlib.suppress(ConnectionResetError):
            assert silent.recv(1) == b""
    assert running.errors == ""


def test_many_tls_clients_at_once(tls: AppProcess, context: ssl.SSLContext) -> None:
    """Twelve clients make handshakes, send large bodies and get large responses at the same time. No connection gets
    the bytes of another."""
    failures: list[object] = []

    def work(number: int) -> None:
        body = bytes([number]) * (MIB + number)
        try:
            for _ in range(4):
                with tls_connection(tls, context) as sock:
                    head = f"POST /digest HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                    if ask(sock, head + body)["digest"] != hashlib.sha256(body).hexdigest():
                        failures.append(number)
                    sock.sendall(f"GET /big?size={MIB + number} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
                    if len(read_response(sock)[2]) != MIB + number:
                        failures.append(number)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
