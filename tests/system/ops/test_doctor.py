"""Tests that `entrepot doctor`, which checks a server and its surroundings, finds real faults: disks, certificates,
upstreams, logins and clocks."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from registry.cli.diagnosis.finding import Level
from registry.cli.ops.doctor_command import diagnose
from registry.config.settings_sources import load_settings
from storage.composition import prepare_data_dir
from tests.fakes.certificate_authority import CertificateAuthority
from tests.fakes.commands import command_environment, entrepot
from tests.fakes.hub.hub import hub
from tests.fakes.server_process import ROOT, running_server
from tests.fakes.upstream_content import UpstreamContent, noise_image


def findings_of(process: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Returns the findings in the output of the command. Checks that each problem has a next step, and the exit
    code."""
    assert process.stdout, process.stderr
    output: dict[str, Any] = json.loads(process.stdout)
    assert process.returncode == (output["level"] == "problem"), process.stderr
    for finding in output["findings"]:
        assert finding["next"] or finding["level"] == "ok", finding
    return list(output["findings"])


def problem(process: subprocess.CompletedProcess[str], check: str) -> dict[str, Any]:
    """Returns the only problem of this check."""
    (finding,) = (
        each for each in findings_of(process) if each["level"] == "problem" and each["check"].startswith(check)
    )
    return finding


def doctor(folder: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs `entrepot doctor --json`."""
    return entrepot("doctor", "--json", *args, folder=folder)


def test_healthy_server(tmp_path: Path) -> None:
    """The command finds no problem with a healthy server, and checks that the configured address leads to this server.
    An address that leads to another server is a problem, which the text output and the exit code show."""
    with (
        running_server(tmp_path / "one", workers=1) as server,
        running_server(tmp_path / "two", workers=1) as other_server,
    ):
        for _ in range(2):
            findings = findings_of(doctor(tmp_path, "--data", server.data, "--listen", server.address))
            assert not [finding for finding in findings if finding["level"] == "problem"]
            assert "leads to this server" in next(each["what"] for each in findings if each["check"] == "address")
        process = doctor(tmp_path, "--data", server.data, "--listen", other_server.address)
        assert "leads to another Entrepot" in problem(process, "address")["what"]
        process = entrepot("doctor", "--data", server.data, "--listen", other_server.address, folder=tmp_path)
        assert process.returncode == 1
        assert "next: correct public_url or the proxy" in process.stdout
    process = doctor(tmp_path, "--data", server.data)
    assert "no server runs" in next(each["what"] for each in findings_of(process) if each["check"] == "server")


def test_invalid_settings(tmp_path: Path) -> None:
    """If the settings cannot be loaded, this is the only finding."""
    (tmp_path / "a.toml").write_text("listen = 5\nlisten_to = 3\n")
    (finding,) = findings_of(doctor(tmp_path, "--config", "a.toml"))
    assert (finding["check"], finding["level"]) == ("settings", "problem")


# By name: the command that causes the fault, the check that finds it, and a part of the finding.
BROKEN_DISKS = {
    "read-only": ("mount -o remount,ro data", "sync", "mounted read-only"),
    "split": ("chmod 750 data && mount -t tmpfs none data/blobs", "data directory", "on different file systems"),
    "full": ("head -c 100m /dev/zero > data/filler 2>/dev/null || true", "disk", "the disk is full"),
}


@pytest.mark.parametrize("case", BROKEN_DISKS)
def test_broken_disk(tmp_path: Path, case: str) -> None:
    """A full file system is a problem, and so is one that has become read-only, as ext4 does after a disk error, and
    a data directory on two file systems. The test mounts these file systems in a mount namespace of its own."""
    command, check, text = BROKEN_DISKS[case]
    namespace_command = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    script = f"""
        mkdir data && mount -t tmpfs -o size=32m none data &&
        "$0" -c 'from pathlib import Path; from storage.composition import prepare_data_dir as p; p(Path("data"))' &&
        {command} && exec "$0" -m registry doctor --json --offline --data data"""
    process = subprocess.run(
        [*namespace_command, "sh", "-c", script, sys.executable],
        cwd=tmp_path,
        env=command_environment(PYTHONPATH=str(ROOT)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    finding = problem(process, check)
    assert text in finding["what"] + (finding["why"] or "")


def test_expired_certificate(tmp_path: Path) -> None:
    """The command reports an expired certificate, with which the server would refuse to start."""
    pair = CertificateAuthority(tmp_path).sign("localhost")
    old = CertificateAuthority(tmp_path).expired(pair)
    process = entrepot(
        *("doctor", "--json", "--offline"),
        folder=tmp_path,
        ENTREPOT_TLS__CERTIFICATE=str(old.certificate),
        ENTREPOT_TLS__KEY=str(old.key),
    )
    finding = problem(process, "certificate")
    assert "expired on" in finding["what"]
    assert "renew it" in finding["next"]


def upstream(folder: Path, url: str, more: str = "", name: str = "docker.io") -> Path:
    """Writes a settings file with one upstream."""
    file = folder / "entrepot.toml"
    file.write_text(f'[[upstream]]\nname = "{name}"\ndefault = true\nendpoints = ["{url}"]\n{more}')
    return file


def test_unreachable_upstream(tmp_path: Path) -> None:
    """The command distinguishes four faults of an upstream: nothing listens on the port, the port expects plain HTTP
    instead of TLS, the host name does not exist, and the server is not a registry."""
    with hub(tmp_path) as live:
        live.refuse()
        finding = problem(doctor(tmp_path, "-c", upstream(tmp_path, live.url)), "upstream")
        assert "cannot be reached" in finding["what"]
        assert "correct host and port" in finding["next"]
        live.listen()
        settings = upstream(tmp_path, live.url.replace("http:", "https:"), "connect_timeout = 1\n")
        finding = problem(doctor(tmp_path, "-c", settings), "upstream")
        assert "write http:// in endpoints" in finding["next"]
    finding = problem(doctor(tmp_path, "-c", upstream(tmp_path, "http://no-such-host.invalid")), "upstream")
    assert "cannot be resolved" in finding["what"]
    assert "/etc/resolv.conf" in finding["next"]
    with web_server(404) as url:
        finding = problem(doctor(tmp_path, "-c", upstream(tmp_path, url)), "upstream")
        assert "answers GET /v2/ with 404" in finding["what"]


def test_login_and_rate_limit(tmp_path: Path) -> None:
    """If the upstream accepts the login, the command shows how many pulls the upstream still allows. A refused login
    and a missing password file are problems."""
    (tmp_path / "right").write_text("secret\n")
    (tmp_path / "wrong").write_text("guess\n")
    content = UpstreamContent()
    content.add("ratelimitpreview/test", noise_image("a", 1000), "latest")
    with hub(tmp_path, content, auth="bearer", username="me", password="secret", limit=100) as live:

        def login(password: str) -> Path:
            return upstream(tmp_path, live.url, f'username = "me"\npassword_file = "{tmp_path / password}"\n')

        findings = findings_of(doctor(tmp_path, "-c", login("right")))
        messages = [each["what"] for each in findings if each["check"].startswith("upstream")]
        assert any("accepts the login of me" in message for message in messages), findings
        assert any("100 of 100 pulls are left" in message for message in messages), findings
        finding = problem(doctor(tmp_path, "-c", login("wrong")), "upstream")
        assert "the login of me is refused" in finding["what"]
        assert "correct the login in" in finding["next"]
        finding = problem(doctor(tmp_path, "-c", login("none")), "upstream")
        assert "cannot be read" in finding["what"]
    with hub(tmp_path, content, auth="bearer", limit=0) as live:
        findings = findings_of(doctor(tmp_path, "-c", upstream(tmp_path, live.url)))
        assert any("pulls are left" in each["what"] for each in findings if each["level"] == "warning"), findings


def test_wrong_clock(tmp_path: Path) -> None:
    """A clock that is two hours ahead of the clock of the upstream is a problem."""
    prepare_data_dir(tmp_path / "data")
    with web_server(200) as url:
        loaded = load_settings({"data": str(tmp_path / "data")}, upstream(tmp_path, url, name="far.test"))
        for seconds_ahead, level in ((0.0, Level.OK), (7200.0, Level.PROBLEM)):
            findings = diagnose(loaded, clock=lambda seconds_ahead=seconds_ahead: time.time() + seconds_ahead)  # type: ignore[misc]
            (finding,) = (each for each in findings if each.check == "clock")
            assert finding.level is level, finding
        assert "the clock is 120 min ahead of" in finding.what or "the clock is 2 h ahead of" in finding.what
        assert "timedatectl" in finding.next_step


@contextmanager
def web_server(status: int) -> Iterator[str]:
    """Runs a web server that answers every GET with this status and the correct Date. Yields its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
