"""Checks of `entrepot doctor` on one upstream. An *upstream* is a mirrored registry, and its *endpoints* are the URLs
at which it can be reached. The checks find out whether the host names of the endpoints can be resolved, whether the
endpoints respond, whether they accept the login, and how many pulls the upstream still allows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from registry.cli.diagnosis.endpoint_client import open_endpoint_client
from registry.cli.diagnosis.finding import Check, Finding, in_thread, ok, problem, warning
from registry.cli.diagnosis.probe import probe
from registry.config import Upstream
from registry.config.mirror_settings import DOCKER_HUB
from registry.upstream.client import HttpUpstreamClient
from registry.upstream.configured_login import ConfiguredLogin
from registry.upstream.transport import OutboundProxies, resolve_host
from storage.errors import Denied, RegistryError, TooManyRequests, UpstreamTimeout
from storage.names import RepositoryName, Tag

ALLOWANCE_REPOSITORY: Final = RepositoryName("ratelimitpreview/test")
"""The repository from which to request a manifest to learn how many pulls Docker Hub still allows (Docker's
documentation). A HEAD request does not count as a pull."""
SLOW_SECONDS: Final = 2.0
"""If the response to GET `/v2/` takes longer than this, there is a warning."""
_PLAIN_HTTP_SECONDS: Final = 2.0
"""Time limit for the request of `_speaks_plain_http`: for each attempt to connect, and for each read or write."""
_FEW_PULLS_FRACTION: Final = 1 / 10
"""If no more than this fraction of the allowed pulls is left, there is a warning."""

OnDate = Callable[[str, str, float], None]
"""A callback that receives the URL of an endpoint, the Date header of its response, and the time at which the response
arrived, in seconds since 1970. `clock_checks` compares the two times."""


def upstream_checks(upstream: Upstream, on_date: OnDate, clock: Callable[[], float] = time.time) -> dict[str, Check]:
    """Returns one check for each endpoint of an upstream, by the check's name. `clock` returns seconds since 1970."""
    checks: dict[str, Check] = {}
    for url in upstream.endpoints:
        name = f"upstream {upstream.name}" + (f" {url}" if len(upstream.endpoints) > 1 else "")
        checks[name] = _EndpointCheck(name, upstream, url, on_date, clock).run
    return checks


class _EndpointCheck:
    """Checks one endpoint. In the methods, `step` is the text that says what the user should do about a finding."""

    def __init__(self, name: str, upstream: Upstream, url: str, on_date: OnDate, clock: Callable[[], float]) -> None:
        self._name = name
        self._upstream = upstream
        self._url = url
        self._on_date = on_date
        self._clock = clock

    async def run(self) -> list[Finding]:
        """Checks the endpoint in stages and returns the findings. Stops after the first stage that finds a problem."""
        try:
            proxy = OutboundProxies().proxy_for(self._url)
        except RegistryError as error:
            step = "name an http or https proxy in HTTPS_PROXY, or unset the variable"
            return [problem(self._name, error.message, "", step)]
        if proxy is None and (finding := await self._check_dns()) is not None:
            return [finding]
        async with open_endpoint_client(self._upstream, self._url, self._clock) as (client, records):
            findings = await self._check_response(client, proxy)
            if any(finding.level == "problem" for finding in findings):
                return findings
            findings += await self._check_login(client)
            if self._upstream.name == DOCKER_HUB and not any(finding.level == "problem" for finding in findings):
                findings += await self._request_allowance(client)
                allowance = await records.allowance(self._upstream.name)
                if allowance is not None and allowance.remaining is not None:
                    findings.append(self._allowance_finding(allowance.remaining, allowance.limit))
        return findings

    async def _check_dns(self) -> Finding | None:
        """Returns a problem if the endpoint's host name cannot be resolved; None otherwise."""
        parts = urlsplit(self._url)
        host = parts.hostname or ""
        try:
            await in_thread(lambda: resolve_host(host, parts.port or (80 if parts.scheme == "http" else 443)))
        except OSError as error:
            reason = error.strerror or str(error)
            step = f"correct the endpoint, or the name servers in /etc/resolv.conf; try: getent hosts {host}"
            return problem(self._name, f"the name {host} cannot be resolved: {reason}", "no image can be fetched", step)
        return None

    async def _check_response(self, client: HttpUpstreamClient, proxy: str | None) -> list[Finding]:
        """Sends GET `/v2/` to the endpoint, and returns a finding about the response. `proxy`: the proxy through which
        the request goes; None: there is none."""
        start = time.monotonic()
        proxy_text = "" if proxy is None else f" through the proxy {urlsplit(proxy).netloc.rpartition('@')[2]}"
        try:
            response = await client.ping()
        except RegistryError as error:
            step = _next_step("timeout" if isinstance(error, UpstreamTimeout) else error.message, self._upstream)
            if proxy is None and await self._speaks_plain_http():
                step = "the endpoint speaks plain HTTP: write http:// in endpoints"
            why = "clients get only cached images"
            return [problem(self._name, f"{error.message}{proxy_text}", why, step)]
        seconds = time.monotonic() - start
        if date := response.headers.get("date"):
            self._on_date(self._url, date, self._clock())
        if response.status == 429:
            step = "wait, or use a login with a larger allowance"
            return [warning(self._name, f"{self._url} answers 429: too many requests", "", step)]
        if response.status not in (200, 401):
            what = f"{self._url} answers GET /v2/ with {response.status}{proxy_text}, not with 200 or 401"
            step = "correct the endpoint, or let a proxy or firewall in between pass these requests"
            return [problem(self._name, what, "another server answers, or the registry is broken", step)]
        if seconds > SLOW_SECONDS:
            step = f"compare endpoints: entrepot mirror test {self._upstream.name}"
            return [warning(self._name, f"{self._url} took {seconds:.1f} s to answer{proxy_text}", "", step)]
        return [ok(self._name, f"{self._url} answers in {seconds * 1000:.0f} ms{proxy_text}")]

    async def _speaks_plain_http(self) -> bool:
        """Returns whether an endpoint whose URL begins with https:// answers plain HTTP on the same port. Returns False
        if the URL has no port: plain HTTP would then use port 80, where another server may answer. Sends a request,
        because the error of the TLS connection can be a timeout: some servers never answer a TLS handshake."""
        parts = urlsplit(self._url)
        if parts.scheme != "https" or parts.port is None:
            return False
        result = await in_thread(lambda: probe(f"http://{parts.netloc}", seconds=_PLAIN_HTTP_SECONDS))
        return result.error is None

    async def _check_login(self, client: HttpUpstreamClient) -> list[Finding]:
        """Tries the login in the settings, and returns a finding about the login; an empty list if there is none."""
        login = ConfiguredLogin(self._upstream)
        if not login.is_configured:
            return []
        where = self._upstream.docker_config or self._upstream.password_file or f"${self._upstream.password_env}"
        step = f"correct the login in {where}"
        try:
            current_login = login.current()
        except RegistryError:
            return [problem(self._name, f"the login in {where} cannot be read", "pulls fail with 502", step)]
        if current_login is None:
            what = f"{where} has no login for {self._upstream.name}"
            step = f"run `docker login`, or {step}"
            return [problem(self._name, what, "requests are sent without a login", step)]
        try:
            await client.check_login()
        except Denied as error:
            return [problem(self._name, f"the login of {current_login.username} is refused", error.message, step)]
        except TooManyRequests as error:
            return [warning(self._name, f"the login could not be tried: {error.message}", "", "wait, and try again")]
        except RegistryError as error:
            return [problem(self._name, f"the login could not be tried: {error.message}", "", step)]
        return [ok(self._name, f"{self._url} accepts the login of {current_login.username or 'the identity token'}")]

    async def _request_allowance(self, client: HttpUpstreamClient) -> list[Finding]:
        """Sends Docker Hub a request whose response says how many pulls are left. `client` saves this number in its
        records. Returns a finding if no pull is left, otherwise an empty list."""
        try:
            await client.resolve_manifest(ALLOWANCE_REPOSITORY, Tag("latest"))
        except TooManyRequests as error:
            step = "wait, use a login with a larger allowance, or name another endpoint for docker.io"
            return [problem(self._name, "Docker Hub allows no more pulls now", error.message, step)]
        except RegistryError:
            pass  # a mirror of Docker Hub may lack this repository
        return []

    def _allowance_finding(self, remaining: int, limit: int | None) -> Finding:
        of_limit = "" if limit is None else f" of {limit}"
        what = f"{remaining}{of_limit} pulls are left"
        if limit is not None and remaining <= limit * _FEW_PULLS_FRACTION:
            step = "configure a login for docker.io (username, password_file): it has a larger allowance"
            return warning(self._name, what, "once no pulls are left, clients get only cached images", step)
        return ok(self._name, what)


def _next_step(error: str, upstream: Upstream) -> str:
    """Returns what the user should do about an endpoint that cannot be reached. `error`: the text of the error, or
    `timeout`."""
    text = error.lower()
    if "expired" in text:
        return (
            "look at the clock of this machine first; if it is right, ask the operator of the upstream to renew the "
            "certificate"
        )
    if "certificate" in text:
        return (
            f'set ca_file for the [[upstream]] "{upstream.name}" to the authority of its certificate'
            if upstream.ca_file is None
            else f"{upstream.ca_file} is not the authority of the upstream's certificate: get the right one"
        )
    if "refused" in text or "connection attempts failed" in text:
        return "correct host and port in endpoints, or start the upstream"
    if "timeout" in text or "timed out" in text:
        return "look for a firewall, and whether a proxy is needed (HTTPS_PROXY)"
    return "correct endpoints, or look at the network; another endpoint can be added to endpoints"
