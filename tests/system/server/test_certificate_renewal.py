"""The server's certificate: which files are refused, and how it is renewed while the server runs."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import ssl
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from registry.server.gate.certificates import CertificateError, CertificateFiles, Certificates, make_context
from tests.fakes.certificate_authority import CertificateAuthority, KeyPair
from tests.system.server.app_process import AppProcess, Start, wait_for
from tests.system.server.tls_client import ask, client_context, serial, tls_connection

QUICK = {"certificate_check_seconds": 0.05, "timeout_check_seconds": 0.05}
DAY = 86400


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def first(authority: CertificateAuthority) -> KeyPair:
    return authority.sign("first")


@pytest.fixture(scope="module")
def second(authority: CertificateAuthority) -> KeyPair:
    return authority.sign("second")


@pytest.fixture
def live(tmp_path: Path, first: KeyPair) -> KeyPair:
    """The files that the server is configured with; tests replace them."""
    pair = KeyPair(tmp_path / "live.pem", tmp_path / "live.key")
    put(first, pair)
    return pair


@pytest.fixture
def context(authority: CertificateAuthority) -> ssl.SSLContext:
    return client_context(authority.certificate)


def put(pair: KeyPair, live: KeyPair) -> None:
    """Renames each file into its place, one after the other, as careful renewal programs do."""
    for source, target in ((pair.certificate, live.certificate), (pair.key, live.key)):
        new = target.with_suffix(".new")
        shutil.copy(source, new)
        new.rename(target)


def files_of(pair: KeyPair) -> CertificateFiles:
    return CertificateFiles(pair.certificate, pair.key)


# What is refused


def test_what_is_missing(tmp_path: Path, first: KeyPair) -> None:
    """The error names a file that is missing or unreadable."""
    with pytest.raises(CertificateError, match=r"cannot read the certificate .*nothing: no such file"):
        make_context(CertificateFiles(tmp_path / "nothing", first.key), time.time())
    with pytest.raises(CertificateError, match=r"cannot read the key of the certificate .*nothing: no such file"):
        make_context(CertificateFiles(first.certificate, tmp_path / "nothing"), time.time())
    with pytest.raises(CertificateError, match=r"cannot read the certificates of the authorities .*: is a directory"):
        make_context(CertificateFiles(first.certificate, first.key, tmp_path, "required"), time.time())


def test_what_does_not_belong_together(
    tmp_path: Path, authority: CertificateAuthority, first: KeyPair, second: KeyPair
) -> None:
    """Another certificate's key, a certificate without a key, text that is neither, and a key with a password are
    refused, each with its own message."""
    text = tmp_path / "text"
    text.write_text("not PEM at all\n")
    wrong = [
        (CertificateFiles(first.certificate, second.key), "does not belong to the certificate in"),
        (CertificateFiles(first.certificate), "cannot be used"),
        (CertificateFiles(text, first.key), "text holds no certificate in PEM form"),
        (CertificateFiles(first.certificate, text), "cannot be used"),
        (CertificateFiles(first.certificate, first.key, text, "optional"), "text holds no certificate in PEM form"),
        (files_of(authority.locked(first)), "is protected by a password"),
    ]
    for files, line in wrong:
        with pytest.raises(CertificateError, match=line):
            make_context(files, time.time())


def test_what_has_expired(authority: CertificateAuthority, first: KeyPair) -> None:
    """An expired certificate is refused; one that is about to expire is not."""
    with pytest.raises(CertificateError, match=r"expired on \d{4}-\d\d-\d\d"):
        make_context(files_of(authority.expired(first)), time.time())
    make_context(files_of(first), time.time() + DAY)
    with pytest.raises(CertificateError, match="expired on"):
        make_context(files_of(first), time.time() + 3 * DAY)


def test_key_and_certificate_in_one_file(tmp_path: Path, first: KeyPair) -> None:
    """One file may contain both."""
    both = tmp_path / "both.pem"
    both.write_bytes(first.certificate.read_bytes() + first.key.read_bytes())
    make_context(CertificateFiles(both), time.time())


# Looking


def test_what_has_not_changed_is_not_read(live: KeyPair) -> None:
    """The context stays the same while the files' times do."""
    certificates = Certificates(files_of(live))
    before = certificates.context
    certificates.refresh()
    certificates.refresh(settled=True)
    assert certificates.context is before


def test_a_change_is_read_once_it_has_settled(live: KeyPair, second: KeyPair) -> None:
    """Changed files are loaded at the second check that finds the same times; at the first one if asked to."""
    certificates = Certificates(files_of(live))
    before = certificates.context
    put(second, live)
    certificates.refresh()
    assert certificates.context is before
    certificates.refresh()
    assert certificates.context is not before
    before = certificates.context
    os.utime(live.key)
    certificates.refresh(settled=True)
    assert certificates.context is not before


def test_what_cannot_be_used_is_told_once(
    live: KeyPair, first: KeyPair, second: KeyPair, caplog: pytest.LogCaptureFixture
) -> None:
    """Invalid files leave the old context, and are neither tried nor logged again; valid ones are loaded later."""
    logging.getLogger("registry.server").propagate = True
    certificates = Certificates(files_of(live))
    before = certificates.context
    shutil.copy(second.certificate, live.certificate)
    with caplog.at_level(logging.WARNING, "registry.server"):
        for _ in range(4):
            certificates.refresh()
        assert certificates.context is before
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith("new connections still use the old certificate: the key in ")
        live.certificate.unlink()
        for _ in range(4):
            certificates.refresh()
        assert certificates.context is before
        assert len(caplog.records) == 2
    put(second, live)
    certificates.refresh(settled=True)
    assert certificates.context is not before


# A server that runs


def named(pair: KeyPair) -> list[str]:
    return [str(pair.certificate), str(pair.key)]


@pytest.fixture
def running(start: Start, live: KeyPair) -> AppProcess:
    return start(workers=2, tls=named(live), limits=QUICK)


def shown(running: AppProcess, context: ssl.SSLContext) -> str:
    """Returns the serial number of the certificate that a new connection gets."""
    with tls_connection(running, context) as sock:
        ask(sock)
        return serial(sock)


def everywhere(running: AppProcess, context: ssl.SSLContext, new: str) -> bool:
    """Returns whether 20 connections, which are spread over the workers, get the new certificate."""
    return all(shown(running, context) == new for _ in range(20))


def test_renewal_under_load(
    running: AppProcess, context: ssl.SSLContext, live: KeyPair, first: KeyPair, second: KeyPair
) -> None:
    """No handshake and no request fails during a renewal. New connections get the new certificate, and open ones go on
    with the old one."""
    wrong: list[BaseException] = []
    ended = threading.Event()

    def load() -> None:
        try:
            while not ended.is_set():
                with tls_connection(running, context) as sock:
                    ask(sock)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with tls_connection(running, context) as kept:
            old = serial(kept)
            for pair in (second, first, second):
                put(pair, live)
                new = {first: old}.get(pair) or other_than(running, context, old)
                wait_for(partial(everywhere, running, context, new))
                assert ask(kept)["size"] == 0
            assert serial(kept) == old
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert "still use the old certificate" not in running.errors


def other_than(running: AppProcess, context: ssl.SSLContext, old: str) -> str:
    wait_for(lambda: shown(running, context) != old)
    return next(new for new in iter(lambda: shown(running, context), None) if new != old)


def test_a_renewal_that_went_wrong(
    running: AppProcess, context: ssl.SSLContext, live: KeyPair, second: KeyPair
) -> None:
    """A certificate without its key changes nothing, and each worker logs it once; with its key it is loaded."""
    old = shown(running, context)
    shutil.copy(second.certificate, live.certificate)
    line = "new connections still use the old certificate: the key in"
    wait_for(lambda: running.errors.count(line) == 2)
    assert everywhere(running, context, old)
    shutil.copy(second.key, live.key)
    new = other_than(running, context, old)
    wait_for(lambda: everywhere(running, context, new))
    assert running.errors.count(line) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_sighup(start: Start, context: ssl.SSLContext, live: KeyPair, second: KeyPair, workers: int) -> None:
    """SIGHUP reloads the files at once, however rarely they are checked."""
    running = start(workers=workers, tls=named(live), limits={"certificate_check_seconds": 3600})
    old = shown(running, context)
    put(second, live)
    os.kill(running.pid, signal.SIGHUP)
    # A worker that ends may close a connection before its first request, as any server does that stops.
    wait_for(lambda: again(running, context) not in ("", old))
    wait_for(lambda: all(again(running, context) not in ("", old) for _ in range(20)))


def test_a_worker_that_starts_again(start: Start, context: ssl.SSLContext, live: KeyPair, second: KeyPair) -> None:
    """A worker that replaces a dead one loads the current certificate, not that of the start."""
    running = start(workers=2, tls=named(live), limits=QUICK)
    old = shown(running, context)
    put(second, live)
    new = other_than(running, context, old)
    wait_for(lambda: everywhere(running, context, new))
    for pid in running.children():
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: again(running, context) == new)
    assert everywhere(running, context, new)


def again(running: AppProcess, context: ssl.SSLContext) -> str:
    try:
        return shown(running, context)
    except OSError:
        return ""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Restores the loggers of other tests."""
    logger = logging.getLogger("registry.server")
    before = logger.propagate, list(logger.handlers), logger.level
    yield
    logger.propagate, logger.handlers, logger.level = before[0], before[1], before[2]
