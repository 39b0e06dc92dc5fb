"""Tests of the server's TLS certificate: which files the server refuses, and how it loads renewed files while it
runs."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from registry.server.gate.certificates import CertificateError, CertificateFiles, Certificates, make_context
from tests.fakes.certificate_authority import CertificateAuthority, KeyPair
from tests.system.server.app_process import AppProcess, Start, wait_for
from tests.system.server.tls_client import ask, client_context, serial, tls_connection

# Limits of the server with which it checks its certificate files every 50 ms.
SHORT_INTERVALS = {"certificate_check_seconds": 0.05, "timeout_check_seconds": 0.05}
DAY = 86400
"""The number of seconds of a day."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def first_pair(authority: CertificateAuthority) -> KeyPair:
    return authority.sign("first")


@pytest.fixture(scope="module")
def second_pair(authority: CertificateAuthority) -> KeyPair:
    return authority.sign("second")


@pytest.fixture
def live_pair(tmp_path: Path, first_pair: KeyPair) -> KeyPair:
    """The certificate and key files that the server is configured with. Tests replace them."""
    files = KeyPair(tmp_path / "live" / "tls.pem", tmp_path / "live" / "tls.key")
    put(first_pair, files)
    return files


@pytest.fixture
def context(authority: CertificateAuthority) -> ssl.SSLContext:
    return client_context(authority.certificate)


def put(pair: KeyPair, live_pair: KeyPair) -> None:
    """Replaces the certificate and the key in `live_pair` by those of `pair`, both at the same moment. Their folder is
    a link, which this function replaces by a link to another folder, as Kubernetes does."""
    link = live_pair.certificate.parent
    folder = Path(tempfile.mkdtemp(dir=link.parent))
    shutil.copy(pair.certificate, folder / live_pair.certificate.name)
    shutil.copy(pair.key, folder / live_pair.key.name)
    new_link = link.with_name("new")
    new_link.symlink_to(folder)
    new_link.rename(link)


def files_of(pair: KeyPair) -> CertificateFiles:
    return CertificateFiles(pair.certificate, pair.key)


# Files that are refused


def test_missing_files_are_refused(tmp_path: Path, first_pair: KeyPair) -> None:
    """The error names a file that is missing or unreadable."""
    with pytest.raises(CertificateError, match=r"cannot read the certificate .*nothing: no such file"):
        make_context(CertificateFiles(tmp_path / "nothing", first_pair.key), time.time())
    with pytest.raises(CertificateError, match=r"cannot read the key of the certificate .*nothing: no such file"):
        make_context(CertificateFiles(first_pair.certificate, tmp_path / "nothing"), time.time())
    with pytest.raises(CertificateError, match=r"cannot read the certificates of the authorities .*: is a directory"):
        make_context(CertificateFiles(first_pair.certificate, first_pair.key, tmp_path, "required"), time.time())


def test_unusable_certificates_and_keys_are_refused(
    tmp_path: Path, authority: CertificateAuthority, first_pair: KeyPair, second_pair: KeyPair
) -> None:
    """The server refuses the key of another certificate, a certificate without a key, files that are not in PEM form,
    a certificate of an unknown version, and a key with a password. Each gets a message of its own."""
    text = tmp_path / "text"
    text.write_text("not PEM at all\n")
    future = tmp_path / "future"
    der = ssl.PEM_cert_to_DER_cert(first_pair.certificate.read_text())
    # X.509 stores version 3 as the number 2 (RFC 5280, section 4.1).
    future.write_text(ssl.DER_cert_to_PEM_cert(der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x07", 1)))
    cases = [
        (CertificateFiles(first_pair.certificate, second_pair.key), "does not belong to the certificate in"),
        (CertificateFiles(first_pair.certificate), "cannot be used"),
        (CertificateFiles(future, first_pair.key), "future has an unknown version"),
        (CertificateFiles(text, first_pair.key), "text holds no certificate in PEM form"),
        (CertificateFiles(first_pair.certificate, text), "cannot be used"),
        (
            CertificateFiles(first_pair.certificate, first_pair.key, text, "optional"),
            "text holds no certificate in PEM form",
        ),
        (files_of(authority.locked(first_pair)), "is protected by a password"),
    ]
    for files, message in cases:
        with pytest.raises(CertificateError, match=message):
            make_context(files, time.time())


def test_expired_certificate_is_refused(authority: CertificateAuthority, first_pair: KeyPair) -> None:
    """The server refuses an expired certificate, and accepts one that expires soon."""
    with pytest.raises(CertificateError, match=r"expired on \d{4}-\d\d-\d\d"):
        make_context(files_of(authority.expired(first_pair)), time.time())
    make_context(files_of(first_pair), time.time() + DAY)
    with pytest.raises(CertificateError, match="expired on"):
        make_context(files_of(first_pair), time.time() + 3 * DAY)


@pytest.mark.parametrize("name", ["key", "authorities"])
def test_file_that_is_removed_while_it_is_loaded_is_refused(
    tmp_path: Path, authority: CertificateAuthority, first_pair: KeyPair, name: str
) -> None:
    """A renewal program removes the key, or the file with the authorities for client certificates, after the server has
    checked that the file can be read. The error names the file."""
    pipe = tmp_path / f"{name}.pem"
    os.mkfifo(pipe)
    files = CertificateFiles(first_pair.certificate, first_pair.key, authority.certificate, "required")
    files = replace(files, key=pipe) if name == "key" else replace(files, client_ca=pipe)

    def write_and_remove() -> None:
        with pipe.open("wb") as file:  # waits until the server has opened the file for its check
            pipe.unlink()
            file.write(b"content")

    writer = threading.Thread(target=write_and_remove)
    writer.start()
    with pytest.raises(CertificateError, match=rf"cannot read .*{name}\.pem: no such file"):
        make_context(files, time.time())
    writer.join()


def test_key_and_certificate_in_one_file(tmp_path: Path, first_pair: KeyPair) -> None:
    """One file may contain both the certificate and the key."""
    combined_file = tmp_path / "both.pem"
    combined_file.write_bytes(first_pair.certificate.read_bytes() + first_pair.key.read_bytes())
    make_context(CertificateFiles(combined_file), time.time())


# Checks for changed files


def test_unchanged_files_are_not_loaded_again(live_pair: KeyPair) -> None:
    """While the modification times of the files stay the same, the TLS context stays the same object."""
    certificates = Certificates(files_of(live_pair))
    old_context = certificates.context
    certificates.refresh()
    certificates.refresh(are_files_complete=True)
    assert certificates.context is old_context


def test_changed_files_are_loaded_when_they_no_longer_change(live_pair: KeyPair, second_pair: KeyPair) -> None:
    """Changed files are loaded at the second check that finds the same modification times. With
    `are_files_complete=True` they are loaded at the first check."""
    certificates = Certificates(files_of(live_pair))
    old_context = certificates.context
    put(second_pair, live_pair)
    certificates.refresh()
    assert certificates.context is old_context
    certificates.refresh()
    assert certificates.context is not old_context
    old_context = certificates.context
    os.utime(live_pair.key)
    certificates.refresh(are_files_complete=True)
    assert certificates.context is not old_context


def test_failed_attempt_is_repeated(live_pair: KeyPair, second_pair: KeyPair) -> None:
    """The process has no file descriptor left while it loads changed files. It loads them later, after a request for a
    reload or after a change of their permissions. The test takes the descriptors away instead of the permissions,
    because root can read every file."""
    certificates = Certificates(files_of(live_pair))
    old_context = certificates.context
    for repair in ("reload", "permissions"):
        put(second_pair, live_pair)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            certificates.refresh(are_files_complete=True)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        certificates.refresh()
        assert certificates.context is old_context
        if repair == "permissions":
            live_pair.key.chmod(0o640)
            certificates.refresh()
        certificates.refresh(are_files_complete=repair == "reload")
        assert certificates.context is not old_context
        old_context = certificates.context


def test_unusable_renewal_is_logged_once(
    live_pair: KeyPair, first_pair: KeyPair, second_pair: KeyPair, caplog: pytest.LogCaptureFixture
) -> None:
    """If the changed files are invalid, the old context stays in use. The same files are not loaded or logged again.
    Valid files are loaded later."""
    logging.getLogger("registry.server").propagate = True
    certificates = Certificates(files_of(live_pair))
    old_context = certificates.context
    shutil.copy(second_pair.certificate, live_pair.certificate)
    with caplog.at_level(logging.WARNING, "registry.server"):
        for _ in range(4):
            certificates.refresh()
        assert certificates.context is old_context
        (message,) = [record.getMessage() for record in caplog.records]
        assert message.startswith("new connections still use the old certificate: the key in ")
        live_pair.certificate.unlink()
        for _ in range(4):
            certificates.refresh()
        assert certificates.context is old_context
        assert len(caplog.records) == 2
    put(second_pair, live_pair)
    certificates.refresh(are_files_complete=True)
    assert certificates.context is not old_context


# Renewal in a running server


def tls_paths(pair: KeyPair) -> list[str]:
    """Returns the paths of the certificate and the key, for the option `tls`."""
    return [str(pair.certificate), str(pair.key)]


@pytest.fixture
def running(start: Start, live_pair: KeyPair) -> AppProcess:
    return start(workers=2, tls=tls_paths(live_pair), limits=SHORT_INTERVALS)


def served_serial(running: AppProcess, context: ssl.SSLContext) -> str:
    """Returns the serial number of the certificate that a new connection gets."""
    with tls_connection(running, context) as sock:
        ask(sock)
        return serial(sock)


def all_connections_get(running: AppProcess, context: ssl.SSLContext, new: str) -> bool:
    """Returns whether 20 new connections, which are spread over the workers, all get the certificate with this serial
    number."""
    return all(served_serial(running, context) == new for _ in range(20))


def test_renewal_under_load(
    running: AppProcess, context: ssl.SSLContext, live_pair: KeyPair, first_pair: KeyPair, second_pair: KeyPair
) -> None:
    """No handshake and no request fails during a renewal. New connections get the new certificate, and open connections
    keep the old one."""
    errors: list[BaseException] = []
    stop = threading.Event()

    def send_requests() -> None:
        try:
            while not stop.is_set():
                with tls_connection(running, context) as sock:
                    ask(sock)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=send_requests) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with tls_connection(running, context) as open_connection:
            old = serial(open_connection)
            for pair in (second_pair, first_pair, second_pair):
                put(pair, live_pair)
                # `old` is the serial number of `first_pair`.
                new = {first_pair: old}.get(pair) or serial_other_than(running, context, old)
                wait_for(partial(all_connections_get, running, context, new))
                assert ask(open_connection)["size"] == 0
            assert serial(open_connection) == old
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert "still use the old certificate" not in running.errors


def serial_other_than(running: AppProcess, context: ssl.SSLContext, old: str) -> str:
    """Waits until a new connection gets another certificate than `old`. Returns its serial number."""
    wait_for(lambda: served_serial(running, context) != old)
    return next(new for new in iter(lambda: served_serial(running, context), None) if new != old)


def test_certificate_without_its_key_is_not_used(
    running: AppProcess, context: ssl.SSLContext, live_pair: KeyPair, second_pair: KeyPair
) -> None:
    """If only the certificate file is replaced, the server keeps the old certificate, and each worker logs the problem
    once. When the key is replaced too, the new certificate is used."""
    old = served_serial(running, context)
    shutil.copy(second_pair.certificate, live_pair.certificate)
    message = "new connections still use the old certificate: the key in"
    wait_for(lambda: running.errors.count(message) == 2)
    assert all_connections_get(running, context, old)
    shutil.copy(second_pair.key, live_pair.key)
    new = serial_other_than(running, context, old)
    wait_for(lambda: all_connections_get(running, context, new))
    assert running.errors.count(message) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_sighup_reloads_the_certificate(
    start: Start, context: ssl.SSLContext, live_pair: KeyPair, second_pair: KeyPair, workers: int
) -> None:
    """On SIGHUP the server loads the files at once, although it checks them only once an hour."""
    running = start(workers=workers, tls=tls_paths(live_pair), limits={"certificate_check_seconds": 3600})
    old = served_serial(running, context)
    put(second_pair, live_pair)
    os.kill(running.pid, signal.SIGHUP)
    # A worker that is being replaced may close a new connection before its first request.
    wait_for(lambda: try_served_serial(running, context) not in ("", old))
    wait_for(lambda: all(try_served_serial(running, context) not in ("", old) for _ in range(20)))


def test_restarted_worker_loads_the_current_certificate(
    start: Start, context: ssl.SSLContext, live_pair: KeyPair, second_pair: KeyPair
) -> None:
    """A worker that replaces a killed worker loads the current certificate, not the one from the start of the
    server."""
    running = start(workers=2, tls=tls_paths(live_pair), limits=SHORT_INTERVALS)
    old = served_serial(running, context)
    put(second_pair, live_pair)
    new = serial_other_than(running, context, old)
    wait_for(lambda: all_connections_get(running, context, new))
    for pid in running.children():
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: try_served_serial(running, context) == new)
    assert all_connections_get(running, context, new)


def try_served_serial(running: AppProcess, context: ssl.SSLContext) -> str:
    """Like `served_serial`, but returns an empty text if the connection fails."""
    try:
        return served_serial(running, context)
    except OSError:
        return ""


@pytest.fixture(autouse=True)
def _restore_logger() -> Iterator[None]:
    """Restores the settings of the logger after each test."""
    logger = logging.getLogger("registry.server")
    old_settings = logger.propagate, list(logger.handlers), logger.level
    yield
    logger.propagate, logger.handlers, logger.level = old_settings[0], old_settings[1], old_settings[2]
