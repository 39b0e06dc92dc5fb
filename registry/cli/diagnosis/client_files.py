"""`ClientFiles`: reads the configuration files of a client program. `TargetRegistry`: the registry through which the
client program should pull."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from registry.cli.diagnosis.finding import Finding, problem, warning
from registry.cli.diagnosis.probe import ProbeError, ProbeResult
from registry.client_addresses import is_loopback_host
from registry.clients.client_setup import ClientSetup, MirroredHost
from registry.clients.registry_address import RegistryAddress
from registry.small_files import read_small_text

_CURL_WITH_CERTIFICATE = "curl --cert client.cert --key client.key"
"""The beginning of a command that sends a request with a client certificate."""


class FileUnusable(Exception):
    """A configuration file cannot be read or parsed. `finding` says why."""

    def __init__(self, finding: Finding) -> None:
        self.finding = finding
        super().__init__(finding.what)


@dataclass(frozen=True, slots=True)
class ClientFiles:
    """Reads the files of one client program.

    - `program`: the name of the client. Each finding about a file has this name as the name of its check
      (`Finding.check`).
    - `root`: the root directory of the client's file system, such as the mount point of a disk; `/` for this machine.
    - `home`: the home directory of the user who runs the client. It is a path on this machine, not relative to `root`.
      None: all files in a home directory count as missing."""

    program: str
    root: Path = Path("/")
    home: Path | None = None

    def path(self, name: str) -> Path:
        """Returns the path of a client's file on this machine. If `name` begins with `~/`, the file is in `home`.
        Otherwise `name` is an absolute path in the client's file system."""
        if name.startswith("~/"):
            return (self.home or Path("/nonexistent")) / name[2:]
        return self.root / name.lstrip("/")

    def first_existing(self, *names: str) -> str | None:
        """Returns the first of the files `names` that exists; None if none of them exists. A file that this user may
        not access counts as existing."""
        return next((name for name in names if self._passes(Path.exists, name)), None)

    def is_directory(self, name: str) -> bool:
        """Returns whether there is a directory at the path, or this user may not access the path."""
        return self._passes(Path.is_dir, name)

    def has_certificate(self, *folders: str) -> bool:
        """Returns whether at least one of the directories contains the certificate of an authority (`*.crt`). Raises
        FileUnusable if no certificate was found and at least one directory cannot be listed."""
        first_error = None
        for folder in folders:
            try:
                if self.matching_files(folder, "*.crt"):
                    return True
            except FileUnusable as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error
        return False

    def matching_files(self, folder: str, pattern: str) -> list[str]:
        """Returns the sorted paths of the files in a directory whose names match `pattern`. Returns an empty list if
        the directory does not exist. Raises FileUnusable if the directory cannot be listed."""
        try:
            # `listdir` raises an error if this user may not list the directory; `Path.glob` does not.
            return sorted(f"{folder}/{name}" for name in os.listdir(self.path(folder)) if fnmatchcase(name, pattern))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._unreadable(folder, error.strerror) from None

    def _passes(self, test: Callable[[Path], bool], name: str) -> bool:
        """Returns the result of `test` for the path of the file `name`; True if this user may not access the path."""
        try:
            return test(self.path(name))
        except PermissionError:
            return True  # a later read of the file raises FileUnusable with the reason

    def read_text(self, name: str) -> str | None:
        """Returns the content of a text file; None if the file does not exist. Raises FileUnusable."""
        try:
            return read_small_text(self.path(name))
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise self._unreadable(name, error.strerror if isinstance(error, OSError) else "it is not UTF-8") from None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Returns the object in a JSON file; None if the file does not exist. An empty file counts as an empty object.
        Raises FileUnusable."""
        text = self.read_text(name)
        if text is None:
            return None
        try:
            value = json.loads(text) if text.strip() else {}
        except json.JSONDecodeError as error:
            raise self._invalid(name, "JSON", f"{error.msg} in line {error.lineno}") from None
        if not isinstance(value, dict):
            raise self._invalid(name, "JSON", "it is no object")
        return value

    def read_toml(self, name: str) -> dict[str, Any] | None:
        """Returns the content of a TOML file; None if the file does not exist. Raises FileUnusable."""
        text = self.read_text(name)
        try:
            return None if text is None else tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise self._invalid(name, "TOML", str(error)) from None

    def read_yaml(self, name: str) -> dict[str, Any] | None:
        """Returns the mapping in a YAML file; None if the file does not exist. An empty file counts as an empty
        mapping. Raises FileUnusable."""
        import yaml

        text = self.read_text(name)
        try:
            value = None if text is None else yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise self._invalid(name, "YAML", " ".join(str(error).split())) from None
        if value is not None and not isinstance(value, dict):
            raise self._invalid(name, "YAML", "it is no mapping")
        return value

    def modification_time(self, name: str) -> float | None:
        """Returns the time at which a file was last written, in seconds since 1970; None if the time cannot be read."""
        try:
            return self.path(name).stat().st_mtime
        except OSError:
            return None

    def _unreadable(self, name: str, reason: str | None) -> FileUnusable:
        advice = "run this command as root, or as the user who runs the client"
        return FileUnusable(problem(self.program, f"{name} cannot be read: {reason}", "", advice))

    def _invalid(self, name: str, language: str, reason: str) -> FileUnusable:
        return FileUnusable(
            problem(
                self.program,
                f"{name} is not valid {language}: {reason}",
                f"{self.program} does not use the file, or does not start",
                f"correct the file, and restart {self.program}",
            )
        )


@dataclass(frozen=True, slots=True)
class TargetRegistry:
    """The registry through which a client should pull.

    - `hosts`: the hosts whose images the client should pull through the registry.
    - `default_upstream`: the name of the upstream that the registry uses for image names without a host, such as
      `ubuntu`. None: the registry has no such upstream.
    - `setup`: the files that `entrepot client` prints for the client.
    - `probe_result`: the result of a *probe*: requests from this machine to `/livez` and `/v2/` at `address`. None:
      there was no probe."""

    address: RegistryAddress
    hosts: Sequence[MirroredHost]
    default_upstream: str | None
    setup: ClientSetup
    probe_result: ProbeResult | None = None

    def is_at(self, url: str) -> bool:
        """Returns whether `url` has the scheme, host and port of this registry."""
        return _same_host_and_port(url, self.address.url) and urlsplit(url).scheme == urlsplit(self.address.url).scheme

    def differs_only_in_scheme(self, url: str) -> bool:
        """Returns whether `url` has the host and port of this registry, but another scheme (http or https)."""
        return _same_host_and_port(url, self.address.url) and not self.is_at(url)

    @property
    def needs_ca(self) -> bool:
        """Whether a probe has found that this machine does not trust the registry's certificate."""
        return self.probe_result is not None and self.probe_result.error is ProbeError.UNTRUSTED

    @property
    def asks_for_login(self) -> bool:
        """Whether a probe has found that the registry requires a login."""
        return self.probe_result is not None and self.probe_result.status == 401

    def content_for(self, name: str) -> str:
        """Returns the content that `entrepot client` prints for the file `name`. If it prints no such file, returns the
        content of the first file that it prints."""
        return next((text for path, text in self.setup.files if path == name), self.setup.files[0][1])


def probe_findings(check: str, result: ProbeResult) -> list[Finding]:
    """Returns one finding if no registry answered the probe; otherwise an empty list. The finding is a problem, or a
    warning if the server requires a client certificate: this command has no client certificate."""
    if result.error is not None:
        steps = {
            ProbeError.DNS: "correct the address (--url, or public_url in the settings), or add the name to the DNS",
            ProbeError.REFUSED: "start the server, or correct the address and the port (--url, public_url, listen)",
            ProbeError.TIMEOUT: "look for a firewall between the two machines",
            ProbeError.UNREACHABLE: "look for a firewall or a missing route between the two machines",
            ProbeError.UNTRUSTED: "make this machine trust the authority of the certificate, or renew the certificate",
            ProbeError.NO_TLS: "use http:// in the address, or set [tls] in the server's settings",
            ProbeError.CLIENT_CERTIFICATE: f"use a client certificate: `{_CURL_WITH_CERTIFICATE} {result.url}/v2/`",
            ProbeError.TLS_ENDED: "if the server requires a client certificate (tls.client_auth), send a request with "
            f"one: `{_CURL_WITH_CERTIFICATE} {result.url}/v2/`; otherwise look at the log of the server or proxy",
            ProbeError.NO_HTTP: "if the server has [tls] in its settings, use https:// in the address",
        }
        what = f"{result.url} does not answer this machine: {result.error.value}"
        make_finding = warning if result.error is ProbeError.CLIENT_CERTIFICATE else problem
        return [make_finding(check, what, result.detail, steps[result.error])]
    if not result.is_registry:
        what = f"{result.url} is no registry: GET /v2/ answers {result.status}"
        advice = "let the proxy pass all paths to Entrepot, or correct the address"
        return [problem(check, what, "another server answers, or a proxy does not pass /v2/ on", advice)]
    return []


def _same_host_and_port(first_url: str, second_url: str) -> bool:
    """Returns whether two URLs have the same host and port. All loopback hosts count as the same host. Returns False if
    a URL is not valid."""
    try:
        first_parts, second_parts = urlsplit(first_url), urlsplit(second_url)
        first_port, second_port = first_parts.port, second_parts.port
    except ValueError:
        return False
    first_port = first_port or {"http": 80, "https": 443}.get(first_parts.scheme)
    second_port = second_port or {"http": 80, "https": 443}.get(second_parts.scheme)
    first_host, second_host = (first_parts.hostname or "").rstrip("."), (second_parts.hostname or "").rstrip(".")
    return first_port == second_port and (
        first_host == second_host or (is_loopback_host(first_host) and is_loopback_host(second_host))
    )
