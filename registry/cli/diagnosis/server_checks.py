"""The checks of `entrepot doctor` on the running server, its address, its settings, and the limits of the machine. A
*finding* is the result of a check: it says what is right or wrong, and what to do next."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from registry import __version__
from registry.cli.diagnosis.client_files import probe_findings
from registry.cli.diagnosis.finding import Finding, in_thread, ok, problem, user_name, warning
from registry.cli.diagnosis.probe import ProbeError, ProbeResult, probe
from registry.clients.registry_address import RegistryAddress
from registry.config import Settings
from registry.status.worker_report import LATE_SECONDS, WorkerReport, read_worker_reports
from storage.running_digest import can_save_digests

MIN_FILES: Final = 4096
"""If a process may open fewer files than this, there is a warning, because a worker then serves only few connections at
a time (docs/en/network.md)."""
MIN_CONNECTIONS: Final = 256
"""If a worker accepts fewer connections than this at a time, there is a warning."""
_BUSY_LOOP_SECONDS: Final = 1.0
"""If the event loop of a worker is late by more than this, there is a warning."""


class ServerCheck:
    """The checks of the server that uses the data directory in the settings."""

    def __init__(self, settings: Settings, address: RegistryAddress, clock: Callable[[], float] = time.time) -> None:
        """`clock` returns seconds since 1970."""
        self._settings = settings
        self._address = address
        self._clock = clock

    async def check_server(self) -> Sequence[Finding]:
        """Checks that the server runs, and that all its worker processes work."""
        reports = await self._reports()
        if not reports:
            what = f"no server runs on {self._settings.data.absolute()}"
            return [warning("server", what, "", "start it: entrepot serve, or systemctl start entrepot")]
        return [*self._worker_findings(reports)] or [ok("server", f"{len(reports)} worker processes serve")]

    async def check_address(self) -> Sequence[Finding]:
        """Checks that the registry's address leads to this server. Returns no findings if the server does not run, or
        if the address has the port 0."""
        name, url = "address", self._address.url
        reports = await self._reports()
        if not reports or url.endswith(":0"):
            return []
        answer = await in_thread(lambda: probe(url))
        findings: list[Finding] = []
        if answer.error is ProbeError.UNTRUSTED and self._settings.tls.certificate is not None:
            step = "give clients the certificate of its authority (docs/en/network.md), or use a public authority"
            what = f"this machine does not trust the certificate of {url}"
            findings.append(warning(name, what, answer.detail, step))
            # A second probe trusts the server's own certificate. It finds out where the address leads.
            certificate = self._settings.tls.certificate
            answer = await in_thread(lambda: probe(url, certificate))
            if answer.error is ProbeError.UNTRUSTED:
                return findings
        return [*findings, *self._address_findings(answer, {report.instance for report in reports})]

    async def _reports(self) -> list[WorkerReport]:
        return await in_thread(lambda: read_worker_reports(self._settings.data))

    def _worker_findings(self, reports: Sequence[WorkerReport]) -> Iterator[Finding]:
        """Yields the problems that the reports of the workers show."""
        now = self._clock()
        for report in reports:
            if now - report.written > LATE_SECONDS:
                what = f"the worker {report.pid} has not reported for {now - report.written:.0f} s"
                step = "look at its log and at the disk (dmesg); to end the worker, run: systemctl restart entrepot"
                yield problem("server", what, "it hangs, or cannot write to the data directory", step)
            elif report.loop_delay > _BUSY_LOOP_SECONDS:
                what = f"the worker {report.pid} was {report.loop_delay:.1f} s late with its last report"
                yield warning(
                    "server", what, "the machine is overloaded, or swaps", "see what else runs: top, vmstat 1"
                )
            if report.read_only:
                step = "free some space; the server then opens the store for writing by itself"
                yield problem(
                    "server", f"the worker {report.pid} has the store open read-only", "the disk is full", step
                )
            if report.max_connections is not None and report.max_connections < MIN_CONNECTIONS:
                what = f"the worker {report.pid} accepts only {report.max_connections} connections at a time"
                yield warning("server", what, "the limit of open files is low", "set LimitNOFILE=65536 in the unit")
        if other_versions := sorted({report.version for report in reports} - {__version__}):
            what = f"the server runs version {', '.join(other_versions)}, but this command has version {__version__}"
            yield warning("server", what, "", "restart the server, so that it runs the installed version")

    def _address_findings(self, answer: ProbeResult, instances: set[str]) -> list[Finding]:
        """Returns the findings about the response to a probe of the registry's address. `instances`: the ids in the
        reports of this server's workers. A response with any other id comes from another server."""
        name, url = "address", self._address.url
        has_public_url = self._settings.public_url is not None
        if answer.error is not None and has_public_url and answer.error in (ProbeError.TIMEOUT, ProbeError.UNREACHABLE):
            # Some networks do not let a machine connect to its own public address.
            step = f"try it from another machine: curl {url}/livez"
            return [warning(name, f"{url} does not answer this machine: {answer.error.value}", answer.detail, step)]
        needs_certificate = self._settings.tls.effective_client_auth == "required"
        if needs_certificate and answer.error in (ProbeError.CLIENT_CERTIFICATE, ProbeError.TLS_ENDED):
            what = f"{url} requires a client certificate (tls.client_auth), so nothing else was checked there"
            return [ok(name, what)]
        if findings := probe_findings(name, answer):
            return findings
        if answer.instance is None:
            step = "let the proxy pass /livez and all other paths to this server"
            return [warning(name, f"{url} is a registry, but its /livez does not identify it", "", step)]
        if answer.instance not in instances:
            step = "correct public_url or the proxy, or name the right data directory with --data"
            return [problem(name, f"{url} leads to another Entrepot, with another data directory", "", step)]
        return [ok(name, f"{url} leads to this server")]


async def open_files_findings() -> Sequence[Finding]:
    """Checks how many files a process may open: the hard limit, to which the server raises the soft limit."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard_limit != resource.RLIM_INFINITY and hard_limit < MIN_FILES:
        step = "set LimitNOFILE=65536 in the unit of systemd, or --ulimit nofile=65536 for the container"
        what = f"a process may open only {hard_limit} files"
        return [warning("open files", what, "each connection needs one, and each request up to three more", step)]
    number_text = "any number of" if hard_limit == resource.RLIM_INFINITY else str(hard_limit)
    return [ok("open files", f"a process may open {number_text} files")]


async def hashing_findings() -> Sequence[Finding]:
    """Checks that the hash of an upload can be saved between two requests."""
    if can_save_digests():
        return [ok("hashing", "blobs are hashed while they arrive")]
    what = "this Python cannot save the hash of an upload between two requests, because it finds no libcrypto.so.3"
    why = "each blob that docker pushes is read and hashed again when it is complete"
    return [warning("hashing", what, why, "install OpenSSL 3 (package libssl3, openssl-libs or libcrypto3)")]


def settings_findings(settings: Settings, warnings: Sequence[str], *, has_file: bool) -> list[Finding]:
    """Checks that the settings are consistent with each other. `warnings`: the warnings from loading the settings.
    `has_file`: whether there is a settings file."""
    from registry.client_addresses import is_loopback_host

    name = "settings"
    findings = [warning(name, text, "", "correct or unset it") for text in warnings]
    is_local = is_loopback_host(settings.listen.rpartition(":")[0].strip("[]"))
    has_tls = settings.tls.certificate is not None or (settings.public_url or "").startswith("https:")
    if settings.insecure_open and (not is_local or settings.trusted_proxies or settings.public_url):
        why = "until there is an account, everybody who can connect can push and delete"
        step = "add an account: entrepot user add NAME --admin, and remove insecure_open"
        findings.append(warning(name, "insecure_open is set", why, step))
    if not is_local and not has_tls:
        why = "others on the network can read and change passwords and content"
        step = "set [tls] certificate and key, or put a proxy with TLS in front and set public_url"
        findings.append(warning(name, f"other machines connect to {settings.listen} without TLS", why, step))
    if settings.trusted_proxies and settings.public_url is None:
        why = "links and login challenges then contain the host that the client sends"
        findings.append(warning(name, "trusted_proxies is set, but not public_url", why, "set public_url"))
    if has_file and not settings.data.is_absolute():
        why = "the path depends on the directory in which the server is started"
        step = f"write the whole path, such as {settings.data.absolute()}"
        findings.append(warning(name, f"data = {str(settings.data)!r} is a relative path", why, step))
    if settings.workers > 2 * (os.cpu_count() or 1):
        what = f"workers = {settings.workers}, on {os.cpu_count()} processors"
        step = "remove the setting; the server then starts one worker for each processor, at most 4"
        findings.append(warning(name, what, "so many workers take memory and gain nothing", step))
    return [*findings, *_upstream_findings(settings)] or [ok(name, "the settings are valid")]


def _upstream_findings(settings: Settings) -> Iterator[Finding]:
    name = "settings"
    for upstream in settings.upstream:
        has_login = upstream.username is not None or upstream.docker_config is not None
        if has_login and (plain_urls := [url for url in upstream.endpoints if url.startswith("http:")]):
            why = "the password is sent without encryption, so others on the network can read it"
            yield warning(name, f"{upstream.name} has a login and the endpoint {plain_urls[0]}", why, "use https://")
        for path in filter(None, (upstream.password_file, upstream.docker_config)):
            try:
                status = path.stat()
            except OSError:
                continue  # the check of the login reports this error
            if status.st_mode & 0o004:
                why = f"the file has the password for {upstream.name}"
                owner = user_name(status.st_uid)
                step = f"chmod o-r {path}; if the server runs as another user than {owner}, first chown … {path}"
                yield warning(name, f"every user of this machine can read {path}", why, step)
    if settings.upstream and settings.default_upstream is None:
        why = (
            "pulls of names without a host, such as `ubuntu`, do not come through this registry, and docker cannot use "
            "it as a mirror"
        )
        step = 'set default = true for one [[upstream]], usually "docker.io"'
        yield warning(name, "no upstream is the default", why, step)
