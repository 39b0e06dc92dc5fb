"""TLS over raw sockets, with each kind of event loop: handshakes, bodies in both directions, and how connections
end."""

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
from tests.system.server.app_process import AppProcess, Start, read_all, read_error, read_response, wait_for
from tests.system.server.tls_client import GET, ask, client_context, tls_connection

LOOPS = [{}, {"NO_UVLOOP": "1"}]
IDS = ["uvloop", "asyncio"]
MIB = 1024 * 1024
LIMITS = {"handshake_seconds": 1.5, "linger_seconds": 0.3, "timeout_check_seconds": 0.05}


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
    running = AppProcess({"tls": named(pair), "limits": LIMITS}, env)
    try:
        yield running.until_ready()
        assert running.errors == ""  # whatever was done to it, there is no word about it
    finally:
        running.close()


def named(pair: KeyPair, *more: str) -> list[str]:
    return [str(pair.certificate), str(pair.key), *more]


# Handshakes


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_request(tls: AppProcess, authority: CertificateAuthority, version: ssl.TLSVersion) -> None:
    """TLS 1.2 and 1.3 are spoken, with HTTP/1.1 on top and a cipher that has forward secrecy; the application sees
    https, and no way to send files past the encryption."""
    context = client_context(authority.certificate)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])
    with tls_connection(tls, context) as sock:
        assert sock.selected_alpn_protocol() == "http/1.1"
        cipher = sock.cipher()
        assert cipher is not None
        assert cipher[0].startswith("TLS_") or (cipher[0].startswith("ECDHE") and "GCM" in cipher[0])
        for _ in range(3):
            seen = ask(sock)
            assert (seen["scheme"], seen["client"], seen["extensions"]) == ("https", "127.0.0.1", [])


def test_an_old_version(tls: AppProcess, authority: CertificateAuthority) -> None:
    """TLS 1.1 is refused in the handshake; the same client gets in with 1.2."""
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
    """A client that speaks plain HTTP gets an error that says so."""
    answer = tls.talk(request_)
    assert read_error(answer) == (400, "UNSUPPORTED")
    assert b"speaks TLS" in answer


@pytest.mark.parametrize("said", [b"\x16", b"\x16\x03\x01\x00\x05hello", b"\x00\xff\x00", b"\x16\x03\x01\xff\xff" * 99])
def test_what_is_no_handshake(tls: AppProcess, said: bytes) -> None:
    """Invalid bytes end the connection, at once or at the handshake's timeout."""
    with tls.connect() as sock:
        sock.sendall(said)
        with contextlib.suppress(ConnectionResetError):
            read_all(sock)


@pytest.mark.parametrize("count", [0, 1, 100])
def test_a_client_that_goes_before_the_handshake_is_over(tls: AppProcess, context: ssl.SSLContext, count: int) -> None:
    """Nothing is left of a client that hangs up during the handshake, wherever it stopped."""
    with tls_connection(tls, context) as watching:
        before = descriptors(watching)
        hello = first_flight(context)
        with tls.connect() as sock:
            sock.sendall(hello[:count])
        with tls.connect() as sock:
            sock.sendall(hello)
            sock.recv(1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        wait_for(lambda: descriptors(watching) == before)


def test_silence(tls: AppProcess) -> None:
    """A client that sends nothing, or stops in the handshake, is cut off."""
    with tls.connect() as silent, tls.connect() as slow:
        slow.sendall(b"\x16\x03")
        begun = time.monotonic()
        for sock in (silent, slow):
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        assert time.monotonic() - begun < 5


def first_flight(context: ssl.SSLContext) -> bytes:
    """Returns a ClientHello."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    half = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        half.do_handshake()
    return outgoing.read()


def descriptors(sock: ssl.SSLSocket) -> int:
    sock.sendall(b"GET /descriptors HTTP/1.1\r\nHost: test\r\n\r\n")
    return int(read_response(sock)[2])


# Certificates of clients


@pytest.mark.parametrize(("mode", "without"), [("required", False), ("optional", True)])
def test_certificates_of_clients(
    start: Start,
    env: dict[str, str],
    authority: CertificateAuthority,
    pair: KeyPair,
    tmp_path: Path,
    mode: str,
    without: bool,
) -> None:
    """A certificate of the configured authority is accepted, one of another is not; whether a client needs one is a
    setting."""
    theirs = CertificateAuthority(tmp_path)
    tls = named(pair, str(authority.certificate), mode)
    running = start(env, tls=tls)
    good, bad = authority.sign("client", client=True), theirs.sign("stranger", client=True)
    assert gets_in(running, client_context(authority.certificate, good))
    assert not gets_in(running, client_context(authority.certificate, bad))
    assert gets_in(running, client_context(authority.certificate)) == without
    assert gets_in(running, client_context(authority.certificate, good))
    assert running.errors == ""


def gets_in(running: AppProcess, context: ssl.SSLContext) -> bool:
    """Returns whether the client is served. In TLS 1.3 it learns only with the first response that its certificate was
    refused."""
    try:
        with tls_connection(running, context) as sock:
            return bool(ask(sock)["pid"])
    except (ssl.SSLError, ConnectionResetError, BrokenPipeError):
        return False


def test_curl_with_a_certificate(start: Start, authority: CertificateAuthority, pair: KeyPair) -> None:
    """curl is served with a certificate, and not without one."""
    running = start(tls=named(pair, str(authority.certificate), "required"))
    own = authority.sign("curl", client=True)
    url = f"https://localhost:{running.address[1]}/echo"
    curl = ["curl", "--silent", "--show-error", "--cacert", str(authority.certificate), url]
    shown = ["--cert", str(own.certificate), "--key", str(own.key)]
    done = subprocess.run([*curl, *shown], capture_output=True, timeout=30, check=True)
    assert json.loads(done.stdout)["scheme"] == "https"
    assert subprocess.run(curl, capture_output=True, timeout=30).returncode != 0


# Bodies


@pytest.mark.parametrize("path", ["/digest?keep=1", "/digest", "/digest?copied=1"])
@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_comes_whole(tls: AppProcess, context: ssl.SSLContext, path: str, chunked: bool) -> None:
    """Every byte of a large body arrives, as views and copied, and the connection is kept."""
    body = os.urandom(8 * MIB + 77)
    framed = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    how = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    with tls_connection(tls, context) as sock:
        for _ in range(2):
            seen = ask(sock, f"POST {path} HTTP/1.1\r\nHost: test\r\n{how}\r\n\r\n".encode() + framed)
            assert seen == {"digest": hashlib.sha256(body).hexdigest(), "size": len(body)}


def test_small_pieces(tls: AppProcess, context: ssl.SSLContext) -> None:
    """A body may come in records of a few bytes, and several requests in one record."""
    with tls_connection(tls, context) as sock:
        sock.sendall(b"POST /digest HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(250):
            sock.sendall(b"abcd")
        assert json.loads(read_response(sock)[2])["digest"] == hashlib.sha256(b"abcd" * 250).hexdigest()
        sock.sendall(GET * 20)
        assert [read_response(sock)[0] for _ in range(20)] == [200] * 20


def test_a_large_answer(tls: AppProcess, context: ssl.SSLContext) -> None:
    """A response sent in pieces of a MiB arrives whole, and the connection is kept."""
    with tls_connection(tls, context) as sock:
        for size in (64 * MIB + 7, MIB, 1):
            sock.sendall(f"GET /big?size={size} HTTP/1.1\r\nHost: test\r\n\r\n".encode() * 2)
            for _ in range(2):
                assert len(read_response(sock)[2]) == size


def test_a_body_that_streams_takes_no_room_from_answers(
    start: Start, env: dict[str, str], context: ssl.SSLContext, pair: KeyPair
) -> None:
    """Pieces of blobs that clients do not take give no other client a 503 for its manifest."""
    running = start(env, tls=named(pair), limits={"unsent_bytes": 512 * 1024})
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            sock = stack.enter_context(tls_connection(running, context, buffer=16 * 1024))
            sock.sendall(b"GET /big?size=16777216 HTTP/1.1\r\nHost: test\r\n\r\n")
            assert sock.recv(12)[-3:] == b"200"
        with tls_connection(running, context) as sock:
            sock.sendall(b"GET /whole?size=100000 HTTP/1.1\r\nHost: test\r\n\r\n")
            assert sock.recv(12)[-3:] == b"200"


def test_an_answer_to_a_client_that_waits(tls: AppProcess, context: ssl.SSLContext) -> None:
    """A client that reads nothing of a GiB makes the server hold a few hundred KiB, and gets the rest when it reads."""
    with tls_connection(tls, context) as warm:
        warm.sendall(b"GET /big?size=67108864 HTTP/1.1\r\nHost: test\r\n\r\n")
        read_response(warm)
    before = resident(tls)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(tls_connection(tls, context, buffer=64 * 1024)) for _ in range(16)]
        for sock in socks:
            sock.sendall(b"GET /big?size=1073741824 HTTP/1.1\r\nHost: test\r\n\r\n")
        for sock in socks:
            assert sock.recv(1)
        with tls_connection(tls, context) as other:
            assert ask(other)["size"] == 0
        assert resident(tls) - before < 16 * 3 * MIB
    for _ in socks:
        tls.said("cut")


def resident(running: AppProcess) -> int:
    with open(f"/proc/{running.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("reset", [True, False])
def test_hang_up(tls: AppProcess, context: ssl.SSLContext, reset: bool) -> None:
    """The application learns that the client left in the middle of a response, and of a request."""
    with tls_connection(tls, context) as sock:
        sock.sendall(b"GET /big?size=1073741824 HTTP/1.1\r\nHost: test\r\n\r\n")
        sock.recv(100_000)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    tls.said("cut")
    with tls_connection(tls, context) as sock:
        sock.sendall(b"POST /patient HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\nabc")
        tls.said("patient")
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    tls.said("left")


def test_close_notify(tls: AppProcess, context: ssl.SSLContext) -> None:
    """A client that ends its side in the middle of a body counts as gone."""
    with tls_connection(tls, context) as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\nabc")
        with contextlib.suppress(OSError):
            sock.unwrap()
        tls.said("disconnected")


def test_the_last_answer(tls: AppProcess, context: ssl.SSLContext) -> None:
    """With `Connection: close` a response of any size arrives whole, followed by close_notify."""
    for size in (10, 5 * MIB):
        with tls_connection(tls, context, buffer=64 * 1024) as sock:
            sock.sendall(f"GET /big?size={size} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
            data = bytearray()
            while piece := sock.recv(65536):  # raises for an end that TLS was not told of
                data += piece
            assert len(data.partition(b"\r\n\r\n")[2]) == size


def test_an_error_while_the_client_sends(tls: AppProcess, context: ssl.SSLContext) -> None:
    """A refusal before the body was read reaches a client that goes on sending."""
    with tls_connection(tls, context) as sock:
        sock.sendall(b"POST /refuse HTTP/1.1\r\nHost: test\r\nContent-Length: 100000000\r\n\r\n")
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            for _ in range(10):
                sock.sendall(bytes(100_000))
        status, headers, _ = read_response(sock)
        assert (status, headers["connection"]) == (403, "close")


# Patience and ends


def test_a_client_that_takes_nothing(start: Start, env: dict[str, str], context: ssl.SSLContext, pair: KeyPair) -> None:
    """A client that reads nothing is cut off; one that reads a little again and again is not."""
    limits = {"send_idle_seconds": 1.0, "timeout_check_seconds": 0.05}
    running = start(env, tls=named(pair), limits=limits)
    request = b"GET /big?size=1073741824 HTTP/1.1\r\nHost: test\r\n\r\n"
    with (
        tls_connection(running, context, buffer=64 * 1024) as slow,
        tls_connection(running, context, buffer=64 * 1024) as stuck,
    ):
        slow.sendall(request)
        assert slow.recv(1)
        until = time.monotonic() + 3
        while time.monotonic() < until:
            assert slow.recv(16 * 1024)
            time.sleep(0.05)  # its pace, not a wait for anything
        stuck.sendall(request)
        running.said("cut")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop(start: Start, env: dict[str, str], context: ssl.SSLContext, pair: KeyPair, workers: int) -> None:
    """A stop waits for a response in progress, but neither for idle clients, whether they read or not, nor for
    handshakes."""
    running = start(env, tls=named(pair), workers=workers, grace=30)
    with (
        tls_connection(running, context) as idle,
        running.connect() as silent,
        tls_connection(running, context) as sock,
    ):
        ask(idle)
        sock.sendall(b"GET /slow?seconds=0.5 HTTP/1.1\r\nHost: test\r\n\r\n")
        running.said("slow")
        begun = time.monotonic()
        os.kill(running.pid, signal.SIGTERM)
        assert read_response(sock)[2] == b"slow"
        assert running.end() == 0
        assert time.monotonic() - begun < 10
        with contextlib.suppress(ConnectionResetError):
            assert silent.recv(1) == b""
    assert running.errors == ""


def test_many_at_once(tls: AppProcess, context: ssl.SSLContext) -> None:
    """Handshakes, large bodies and responses at the same time do not mix."""
    wrong: list[object] = []

    def work(place: int) -> None:
        body = bytes([place]) * (MIB + place)
        try:
            for _ in range(4):
                with tls_connection(tls, context) as sock:
                    head = f"POST /digest HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                    if ask(sock, head + body)["digest"] != hashlib.sha256(body).hexdigest():
                        wrong.append(place)
                    sock.sendall(f"GET /big?size={MIB + place} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
                    if len(read_response(sock)[2]) != MIB + place:
                        wrong.append(place)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
