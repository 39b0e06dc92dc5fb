"""The checks that `entrepot doctor` makes of the clock, the TLS certificate, the data directory and the settings."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from pydantic import ByteSize

from registry.cli.diagnosis.certificate_checks import certificate_findings
from registry.cli.diagnosis.clock_checks import EARLIEST_PLAUSIBLE_TIME, clock_findings, file_clock_findings
from registry.cli.diagnosis.data_checks import data_checks, disk_responds
from registry.cli.diagnosis.finding import Finding, Level, in_thread, ok, run_checks, user_name, worst_level
from registry.cli.diagnosis.server_checks import hashing_findings, settings_findings
from registry.clients.registry_address import registry_address
from registry.config import Settings
from registry.config.settings import TLSSettings
from registry.config.upkeep_settings import DiskSettings
from storage import running_digest
from storage.composition import check_version, layout_of, prepare_data_dir
from storage.data_dir.check import DataDirectoryError
from storage.errors import UpstreamUnavailable
from tests.fakes.certificate_authority import CertificateAuthority
from tests.fakes.second_connection import second_connection

NOW = EARLIEST_PLAUSIBLE_TIME + 10_000_000.0
URL = "https://registry-1.docker.io"


def dates(*seconds_ahead: float) -> dict[str, tuple[str, float]]:
    """Returns the argument `dates` of `clock_findings`: for the URL of each upstream, its Date header, and the time
    `NOW` at which the header arrived. `seconds_ahead`: for each upstream, by how much this machine's clock is ahead."""
    return {f"{URL}/{number}": (formatdate(NOW - each, usegmt=True), NOW) for number, each in enumerate(seconds_ahead)}


@pytest.mark.parametrize(
    ("now", "answers", "level", "problem_text"),
    [
        (NOW, dates(), Level.OK, ""),
        (NOW, dates(20.0), Level.OK, ""),
        (NOW, {URL: ("yesterday", NOW)}, Level.OK, ""),
        (NOW, dates(-90.0), Level.WARNING, "behind"),
        (NOW, dates(3600.0), Level.PROBLEM, "the clock is 60 min ahead of"),
        (NOW, dates(-86400.0 * 3), Level.PROBLEM, "the clock is 3 days behind"),
        (NOW, dates(3600.0, 1.0), Level.OK, ""),  # only the clock of the first upstream is wrong
        (86400.0, dates(), Level.PROBLEM, "1970-01-02 00:00 UTC, but this program is newer"),
    ],
)
def test_the_clock_is_compared_with_upstreams(
    now: float, answers: dict[str, tuple[str, float]], level: Level, problem_text: str
) -> None:
    """The clock is compared with the clocks of the upstreams, with a tolerance. It is also compared with the release
    date of the program."""
    (finding,) = clock_findings(now, answers)
    assert finding.level is level
    assert problem_text in finding.what
    assert ("timedatectl" in finding.next_step) == (level is not Level.OK)


def test_the_clock_is_compared_with_files(tmp_path: Path) -> None:
    """If the database was written in the future, the clock has been set back, so there is a finding."""
    layout_of(tmp_path).metadata.write_bytes(b"")
    os.utime(layout_of(tmp_path).metadata, (NOW, NOW))
    assert file_clock_findings(NOW - 10, tmp_path) == []
    (finding,) = file_clock_findings(NOW - 86400 * 3, tmp_path)
    assert finding.level is Level.PROBLEM
    assert "entrepot.db was written 3 days in the future" in finding.what


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority(tmp_path_factory.mktemp("authority"))


def worst_finding(certificate: Path, key: Path, url: str = "https://localhost:5000", days: float = 0.0) -> Finding:
    """Returns the finding of the highest level about the certificate, as of this many days from now."""
    settings = Settings(tls=TLSSettings(certificate=certificate, key=key))
    findings = certificate_findings(settings, url, time.time() + days * 86400)
    return max(findings, key=lambda finding: list(Level).index(finding.level))


def test_certificate_findings(authority: CertificateAuthority, tmp_path: Path) -> None:
    """There is a finding if the certificate has expired, expires soon, is not valid yet, is for another name, lacks its
    chain, or does not belong to the key."""
    pair, other = authority.sign("localhost"), authority.sign("other")
    with_chain = tmp_path / "whole.pem"
    with_chain.write_text(pair.certificate.read_text() + authority.certificate.read_text())
    assert "is valid until" in worst_finding(with_chain, pair.key).what
    expired = authority.expired(pair)
    for finding in (worst_finding(expired.certificate, expired.key), worst_finding(with_chain, pair.key, days=30)):
        assert finding.level is Level.PROBLEM
        assert "expired on" in finding.what
        assert "clients refuse it" in finding.why
        assert "renew it" in finding.next_step
    expiring = worst_finding(with_chain, pair.key, days=1.9)
    assert (expiring.level, "expires in 0 days" in expiring.what) == (Level.WARNING, True)
    assert "is not valid before" in worst_finding(with_chain, pair.key, days=-5).what
    for_other_name = worst_finding(with_chain, pair.key, "https://registry.example.com")
    assert "is for localhost, 127.0.0.1, and not for registry.example.com" in for_other_name.what
    assert "subjectAltName" not in worst_finding(with_chain, pair.key, "https://127.0.0.1:5000").what
    without_chain = worst_finding(pair.certificate, pair.key)
    assert (without_chain.level, "fullchain.pem" in without_chain.next_step) == (Level.WARNING, True)
    wrong_chain = tmp_path / "wrong.pem"
    wrong_chain.write_text(pair.certificate.read_text() + other.certificate.read_text())
    assert "but did not sign it" in worst_finding(wrong_chain, pair.key).what
    assert "does not belong to the certificate" in worst_finding(pair.certificate, other.key).what
    assert "cannot read" in worst_finding(tmp_path / "none.pem", pair.key).what


def test_findings_about_client_certificates(authority: CertificateAuthority, tmp_path: Path) -> None:
    """For settings with which the server does not start, there is a finding of the level `PROBLEM`. The test tries a
    `client_ca` that does not exist (without `client_auth`), `client_auth` without `client_ca`, and `key` without
    `certificate`. With `client_auth = "off"`, a missing `client_ca` is no problem."""
    pair, missing = authority.sign("localhost"), tmp_path / "none.pem"
    for tls, text in (
        (TLSSettings(certificate=pair.certificate, key=pair.key, client_ca=missing), f"{missing}: no such file"),
        (TLSSettings(certificate=pair.certificate, key=pair.key, client_auth="required"), "set tls.client_ca"),
        (TLSSettings(key=pair.key), "set tls.certificate"),
    ):
        (finding,) = certificate_findings(Settings(tls=tls), "https://localhost:5000", time.time())
        assert (finding.level, text in finding.what) == (Level.PROBLEM, True), finding
        assert "the server does not start" in finding.why
    unused = TLSSettings(certificate=pair.certificate, key=pair.key, client_ca=missing, client_auth="off")
    findings = certificate_findings(Settings(tls=unused), "https://localhost:5000", time.time())
    assert not [finding for finding in findings if finding.level is Level.PROBLEM]


def test_the_certificate_of_a_server_whose_name_is_unknown(tmp_path: Path) -> None:
    """If the server listens on all addresses and has no `public_url`, its host name is not known, and the checks only
    guess `localhost`. So a certificate for another name has a finding of the level `WARNING`. If the server listens on
    `localhost` alone, such a certificate has a finding of the level `PROBLEM`."""
    name, output_options = (
        "registry.example.com",
        ("-keyout", tmp_path / "key.pem", "-out", tmp_path / "certificate.pem"),
    )
    certificate_options = (
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-noenc",
        "-days",
        "90",
    )
    names = ("-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}")
    command: list[str | Path] = ["openssl", "req", *certificate_options, *names, *output_options]
    subprocess.run(command, check=True, capture_output=True)
    tls = TLSSettings(certificate=tmp_path / "certificate.pem", key=tmp_path / "key.pem")
    everywhere = Settings(tls=tls, listen="0.0.0.0:443")
    (finding,) = certificate_findings(everywhere, registry_address(everywhere).url, time.time())
    assert finding.level is Level.WARNING
    assert "set public_url" in finding.next_step
    assert name in finding.what
    local = Settings(tls=tls, listen="localhost:443")
    assert certificate_findings(local, registry_address(local).url, time.time())[0].level is Level.PROBLEM


@pytest.mark.parametrize(
    ("subject", "listen", "needed_name"),
    [
        ("/CN=registry.example.com", "0.0.0.0:443", "DNS:registry.example.com"),
        ("/O=Our team", "0.0.0.0:443", f"DNS:{socket.gethostname()}"),
        ("/CN=old", "192.0.2.7:443", "IP:192.0.2.7"),
        ("/CN=old", "localhost:443", "DNS:localhost"),
    ],
    ids=["common name", "name of this machine", "address in listen", "localhost in listen"],
)
def test_a_certificate_without_names(tmp_path: Path, subject: str, listen: str, needed_name: str) -> None:
    """If a certificate names no host, the next step says which name the certificate needs. This is the host or address
    to which clients connect, if the settings have it. Otherwise it is the common name of the certificate, or the name
    of this machine."""
    output_options = ("-keyout", tmp_path / "key.pem", "-out", tmp_path / "certificate.pem", "-subj", subject)
    certificate_options = (
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-noenc",
        "-days",
        "90",
    )
    command: list[str | Path] = ["openssl", "req", *certificate_options, *output_options]
    subprocess.run(command, check=True, capture_output=True)
    tls = TLSSettings(certificate=tmp_path / "certificate.pem", key=tmp_path / "key.pem")
    settings = Settings(tls=tls, listen=listen)
    (finding,) = certificate_findings(settings, registry_address(settings).url, time.time())
    assert "names no host" in finding.what
    assert finding.next_step == f"make a certificate with subjectAltName = {needed_name}"


async def test_a_directory_that_cannot_be_examined(tmp_path: Path) -> None:
    """If the system call for the directory fails, the finding has the system's reason. The check itself does not
    fail."""
    (finding,) = await run_checks(data_checks(Settings(data=tmp_path / ("a" * 300))))
    assert finding.level is Level.PROBLEM
    assert "cannot be accessed: File name too long" in finding.what


def test_plain_http_needs_no_certificate() -> None:
    """Without a certificate, there is no problem: the server uses plain HTTP, or a proxy in front of it has the
    certificate."""
    assert certificate_findings(Settings(), "http://localhost:5000", NOW) == []
    (finding,) = certificate_findings(Settings(), "https://registry.example.com", NOW)
    assert finding.level is Level.OK


async def problems_of_data(settings: Settings) -> list[Finding]:
    """Returns the findings about the data directory that are not OK. Leaves out findings about memory."""
    findings = await run_checks(data_checks(settings))
    return [finding for finding in findings if finding.level is not Level.OK and "in memory" not in finding.what]


@pytest.mark.full_store
@pytest.mark.slow
async def test_data_directory_findings(tmp_path: Path) -> None:
    """A prepared directory has no problem. For a path that is missing, almost full, writable by everyone or not a
    directory, the finding says so. The checks change no file."""
    data = tmp_path / "data"
    (missing,) = await problems_of_data(Settings(data=data))
    assert "there is no" in missing.what
    prepare_data_dir(data)
    assert await problems_of_data(Settings(data=data)) == []
    paths_before = sorted(data.rglob("*"))
    (low,) = await problems_of_data(Settings(data=data, disk=DiskSettings(min_free=ByteSize(1 << 60))))
    assert "the disk is almost full" in low.what
    assert "entrepot cache evict" in low.next_step
    data.chmod(0o777)
    assert "chmod o-w" in (await problems_of_data(Settings(data=data)))[0].next_step
    assert sorted(data.rglob("*")) == paths_before
    (tmp_path / "file").write_text("")
    (finding,) = await problems_of_data(Settings(data=tmp_path / "file"))
    assert "is not a directory" in finding.what


@pytest.mark.full_store
async def test_database_findings(tmp_path: Path) -> None:
    """There is a finding for a database of another version, and for a file that is not a database."""
    # The errors for an older and for a newer database contain this path. The check must not tell them apart by words.
    data = tmp_path / "older than newer"
    prepare_data_dir(data)

    async def finding_of_version(number: int) -> Finding:
        connection = second_connection(layout_of(data).metadata)
        connection.pragma("user_version", number)
        connection.close()
        (finding,) = await problems_of_data(Settings(data=data))
        return finding

    old, new = await finding_of_version(1), await finding_of_version(1000)
    assert "another version" in old.why
    assert "entrepot serve" in old.next_step
    assert "another version" in new.why
    assert new.next_step == "use that version of entrepot"
    layout_of(data).metadata.write_bytes(b"no database" * 1000)
    (finding,) = await problems_of_data(Settings(data=data))
    assert "cannot be used" in finding.what
    assert "entrepot restore" in finding.next_step


@pytest.mark.full_store
@pytest.mark.parametrize("closed", ["", "entrepot.db", "entrepot.db-wal", "entrepot.db-shm"])
@pytest.mark.slow
async def test_a_database_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    """If this user may not use the database, a file of its log or the data directory, the next step is to run the
    command as another user or to give the file away, not to restore a backup."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    database, access = layout_of(data).metadata, os.access
    database.write_bytes(b"this fails like a database that this user may not open")
    path = data / closed
    if not path.exists():
        path.touch()
    monkeypatch.setattr(os, "access", lambda asked, mode: asked != path and access(asked, mode))
    (finding,) = (found for found in await problems_of_data(Settings(data=data)) if "cannot be used" in found.what)
    assert finding.why == f"this user may not read and change {path}"
    is_of_log = closed.endswith(("-wal", "-shm"))
    assert finding.next_step == (
        f"give the file to the user of the server: chown … {path}"
        if is_of_log
        else "run the command as root or as the user of the server"
    )


@pytest.mark.full_store
async def test_owner_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a finding if the directory belongs to another user than the one who runs the command. There is also a
    finding if a file in it belongs to another user, because the server cannot change this file."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    if os.geteuid() == 0:  # only root can change the owner of a file
        os.chown(layout_of(data).metadata_lock, 12345, 12345)
        (finding,) = await problems_of_data(Settings(data=data))
        assert "locks/metadata belongs to uid 12345" in finding.what
        assert "chown -R" in finding.next_step
        os.chown(layout_of(data).metadata_lock, 0, 0)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    (finding,) = await problems_of_data(Settings(data=data))
    assert "and this command runs as uid 12345" in finding.what
    assert "sudo -u" in finding.next_step


@pytest.mark.full_store
async def test_a_directory_without_the_right_to_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another user than the owner runs the command and may not open the files in the directory, a finding names both
    users. `check_version` raises an error with the system's reason."""
    prepare_data_dir(tmp_path)
    stat = os.stat

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if Path(str(path)).parent == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12345)
        patch.setattr(os, "stat", refuse)
        findings = await problems_of_data(Settings(data=tmp_path))
        with pytest.raises(DataDirectoryError, match="cannot be read: Permission denied"):
            check_version(tmp_path)
    assert any("and this command runs as uid 12345" in finding.what for finding in findings), findings


async def test_checks_end_when_the_disk_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk of the directory hangs, its checks end at their time limit."""
    stat, released = os.stat, threading.Event()

    def hang(path: Any, **options: Any) -> os.stat_result:
        if str(path) == str(tmp_path):
            released.wait(10)
        return stat(path, **options)

    def hang_access(path: Any, mode: int) -> bool:
        return not released.wait(10)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", hang)
        patch.setattr(os, "access", hang_access)
        try:
            assert not disk_responds(tmp_path, 0.01)
            findings = await run_checks(data_checks(Settings(data=tmp_path)), seconds=0.05)
            assert not released.is_set()
        finally:
            released.set()
    assert len(findings) == 5
    assert all("did not end within" in finding.what for finding in findings), findings
    assert disk_responds(tmp_path)


def test_settings_findings(tmp_path: Path) -> None:
    """There is a finding for settings that are valid but unsafe or of no use."""

    def findings_text(**values: object) -> str:
        # `has_file`: there is a settings file. Without one, a relative path would be no finding.
        findings = settings_findings(Settings.model_validate(values), warnings=(), has_file=True)
        assert all(finding.next_step for finding in findings if finding.level is not Level.OK)
        return " ".join(finding.what for finding in findings)

    assert findings_text(data="/srv") == "the settings are valid"
    assert "insecure_open is set" in findings_text(data="/srv", listen="0.0.0.0:5000", insecure_open=True)
    assert "insecure_open is set" in findings_text(
        data="/srv", public_url="https://registry.example.com", insecure_open=True
    )
    assert "without TLS" in findings_text(data="/srv", listen="0.0.0.0:5000")
    assert "without TLS" not in findings_text(
        data="/srv", listen="0.0.0.0:5000", public_url="https://registry.example.com"
    )
    assert "not public_url" in findings_text(data="/srv", trusted_proxies=["10.0.0.0/8"])
    assert "is a relative path" in findings_text(data="data")
    assert "no upstream is the default" in findings_text(data="/srv", upstream=[{"name": "docker.io"}])
    password = tmp_path / "password"
    password.write_text("secret")
    password.chmod(0o644)
    upstream = {"name": "x.test", "endpoints": ["http://x.test"], "username": "u", "password_file": password}
    text = findings_text(data="/srv", upstream=[{**upstream, "default": True}])
    assert "has a login and the endpoint http://x.test" in text
    assert "every user of this machine can read" in text


def test_the_server_can_still_read_its_password(tmp_path: Path) -> None:
    """If everybody can read the file with a password, the next step takes this right away, but says that the server
    must still be able to read the file."""
    password = tmp_path / "password"
    password.write_text("secret")
    password.chmod(0o644)
    upstream = {"name": "x.test", "default": True, "username": "u", "password_file": password}
    settings = Settings.model_validate({"data": "/srv", "upstream": [upstream]})
    findings = settings_findings(settings, warnings=(), has_file=True)
    (step,) = (finding.next_step for finding in findings if "every user of this machine can read" in finding.what)
    assert step == (
        f"chmod o-r {password}; if the server runs as another user than {user_name(password.stat().st_uid)}, "
        f"first chown … {password}"
    )


async def test_a_failing_check_does_not_affect_others() -> None:
    """If a check hangs, raises an error or has a bug, this becomes a finding. The other checks are not affected."""
    started: list[str] = []

    async def hang() -> Sequence[Finding]:
        await in_thread(lambda: time.sleep(60))
        return []

    async def fail() -> Sequence[Finding]:
        raise UpstreamUnavailable("nobody there")

    async def bug() -> Sequence[Finding]:
        raise ZeroDivisionError("one")

    async def fine() -> Sequence[Finding]:
        started.append("fine")
        return [ok("fine", "good")]

    findings = await run_checks({"hang": hang, "fail": fail, "bug": bug, "fine": fine}, seconds=0.05)
    assert [finding.check for finding in findings] == ["hang", "fail", "bug", "fine"]
    assert "did not end within 0.05 s" in findings[0].what
    assert "nobody there" in findings[1].what
    assert "ZeroDivisionError" in findings[2].what
    assert worst_level(findings) is Level.PROBLEM
    assert started == ["fine"]
    with pytest.raises(OSError, match="no"):
        await in_thread(lambda: (_ for _ in ()).throw(OSError("no")))
    assert await in_thread(lambda: 1) == 1


async def test_hashes_of_uploads_that_cannot_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a warning if the state of a digest cannot be saved. It names what to install."""
    (finding,) = await hashing_findings()
    assert finding.level is Level.OK
    monkeypatch.setattr(running_digest, "_libcrypto_hash", lambda _: None)
    (finding,) = await hashing_findings()
    assert finding.level is Level.WARNING
    assert "OpenSSL 3" in finding.next_step
