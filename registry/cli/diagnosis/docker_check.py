"""Checks whether docker on a machine pulls through this registry. Reads `daemon.json`, and the CA certificates in
`certs.d`. The module `docker_proxies` checks docker's proxies.

Sources: dockerd(8), "daemon configuration file"; moby, registry/config.go (`ValidateMirror`, `isSecureIndex`); docker
docs, "Registry as a pull through cache" and "Verify repository client with certificates".
"""

from __future__ import annotations

import difflib
import ipaddress
import json
from typing import Any
from urllib.parse import urlsplit

from registry.cli.diagnosis.client_files import ClientFiles, FileUnusable, TargetRegistry
from registry.cli.diagnosis.docker_proxies import proxy_findings
from registry.cli.diagnosis.finding import Finding, ok, problem, warning
from registry.config.mirror_settings import DOCKER_HUB

CHECK = "docker"
_FILES = ("/etc/docker/daemon.json", "~/.config/docker/daemon.json", "/var/snap/docker/current/config/daemon.json")
"""The paths of docker's configuration: for the usual daemon, for a daemon without root, and for docker as a snap."""
_MIRRORS, _INSECURE = "registry-mirrors", "insecure-registries"
_RESTART = "then run: systemctl restart docker"


def check_docker(files: ClientFiles, target: TargetRegistry) -> list[Finding]:
    """Returns the findings. Docker Hub is the only mirrored host that is checked, because docker supports mirrors only
    for Docker Hub."""
    file = files.first_existing(*_FILES) or _FILES[0]
    try:
        daemon = files.read_json(file)
    except FileUnusable as error:
        return [error.finding]
    findings: list[Finding] = []
    if any(host.upstream == DOCKER_HUB for host in target.hosts):
        findings += _check_mirror(file, daemon, target)
    findings += _check_hosted(files, file, daemon or {}, target)
    return [*findings, *proxy_findings(files, file, daemon or {}, target), *_misspelt_keys(file, daemon or {})]


def _check_mirror(file: str, daemon: dict[str, Any] | None, target: TargetRegistry) -> list[Finding]:
    """Checks whether docker pulls the images of Docker Hub through the registry. Returns the findings."""
    new_content, next_step = _corrected_content(daemon, target), f"write this to {file}, {_RESTART}"
    if target.default_upstream != DOCKER_HUB:
        return [
            problem(
                CHECK,
                "this registry serves Docker Hub's images only under names that begin with docker.io",
                "docker asks a mirror for library/ubuntu, not for docker.io/library/ubuntu",
                'set default = true for the [[upstream]] "docker.io" in the registry\'s settings',
            )
        ]
    mirrors = (daemon or {}).get(_MIRRORS)
    if daemon is None or not mirrors:
        what = f"there is no {file}" if daemon is None else f"{file} names no mirror"
        why = "docker pulls straight from Docker Hub"
        return [problem(CHECK, what, why, next_step, file=file, lines=new_content)]
    if not isinstance(mirrors, list) or not all(isinstance(mirror, str) for mirror in mirrors):
        what, why = f"{_MIRRORS} in {file} is no list of URLs", "docker does not start with this file"
        return [problem(CHECK, what, why, next_step, file=file, lines=new_content)]
    for mirror in mirrors:
        if not _is_valid_mirror(mirror):
            what = f"{mirror!r} in {file} is not a mirror's address"
            why = "docker does not start: a mirror's address needs http:// or https://, and must not have a path"
            return [problem(CHECK, what, why, next_step, file=file, lines=new_content)]
    position = next((number for number, mirror in enumerate(mirrors) if target.is_at(mirror)), None)
    if position is None:
        if wrong_url := next((mirror for mirror in mirrors if target.differs_only_in_scheme(mirror)), None):
            what = f"{file} names {wrong_url}, but the registry is at {target.address.url}"
            why = "docker cannot connect to this mirror, and pulls from Docker Hub without a message"
        else:
            what, why = f"{file} names only other mirrors: {', '.join(mirrors)}", "docker does not know this registry"
        return [problem(CHECK, what, why, next_step, file=file, lines=new_content)]
    if position:
        what = f"{file} names {mirrors[0]} before this registry"
        why = "docker asks this registry only for what the first mirror does not have"
        return [warning(CHECK, what, why, f"put {target.address.url} first, {_RESTART}")]
    findings = [ok(CHECK, f"pulls of {DOCKER_HUB} come through {target.address.url} ({file})")]
    if target.asks_for_login:
        findings.append(
            warning(
                CHECK,
                "this registry asks for a login, and docker sends none to a mirror",
                "docker then pulls straight from Docker Hub (moby #30880)",
                "to let everybody pull these images, run: entrepot grant add 'docker.io/**' pull everyone",
            )
        )
    return findings


def _check_hosted(files: ClientFiles, file: str, daemon: dict[str, Any], target: TargetRegistry) -> list[Finding]:
    """Checks whether images whose names begin with the registry's host can be pulled and pushed. Returns the
    findings."""
    address = target.address
    if address.is_plain_http:
        if address.docker_accepts_plain_http or _is_insecure(daemon.get(_INSECURE), address.host):
            return [ok(CHECK, f"docker reaches {address.host} by plain HTTP")]
        return [
            problem(
                CHECK,
                f"docker expects TLS from {address.host}, which speaks plain HTTP",
                f"docker pull {address.host}/NAME says: server gave HTTP response to HTTPS client",
                f"write this to {file}, {_RESTART}",
                file=file,
                lines=_corrected_content(daemon, target),
            )
        ]
    folder = f"/etc/docker/certs.d/{address.host}"
    try:
        is_trusted = not target.needs_ca or files.has_certificate(folder)
    except FileUnusable as error:
        return [error.finding]
    if not is_trusted:
        return [
            problem(
                CHECK,
                f"docker does not trust the certificate of {address.host}",
                target.probe_result.detail if target.probe_result else "",
                f"copy the certificate of its authority to {folder}/ca.crt; no restart is needed",
                file=f"{folder}/ca.crt",
            )
        ]
    return [ok(CHECK, f"docker reaches {address.host} by TLS")]


def _is_insecure(entries: Any, host: str) -> bool:
    """Returns whether docker accepts plain HTTP from `host`. `entries`: the value of `insecure-registries`, a list of
    hosts and networks."""
    if not isinstance(entries, list):
        return False
    host_name = urlsplit(f"//{host}").hostname or ""
    for entry in entries:
        if entry in (host, f"http://{host}"):
            return True
        try:
            if ipaddress.ip_address(host_name) in ipaddress.ip_network(str(entry), strict=False):
                return True
        except ValueError:
            continue
    return False


def _misspelt_keys(file: str, daemon: dict[str, Any]) -> list[Finding]:
    """Returns a finding for each key that looks like a misspelt `registry-mirrors` or `insecure-registries`. With such
    a key, docker does not start."""
    findings = []
    for key in daemon:
        close_matches = difflib.get_close_matches(key.lower().replace("_", "-"), (_MIRRORS, _INSECURE), 1, 0.8)
        if close_matches and key != close_matches[0]:
            why = "docker does not start: the directive does not match any configuration option"
            findings.append(
                problem(CHECK, f"{key!r} in {file} is not a key of docker", why, f"write {close_matches[0]!r}")
            )
    return findings


def _corrected_content(daemon: dict[str, Any] | None, target: TargetRegistry) -> str:
    """Returns the content that daemon.json should have: the present content without useless mirrors (`_is_useless`),
    plus the missing entries."""
    merged = {key: value for key, value in (daemon or {}).items() if key not in (_MIRRORS, _INSECURE)}
    # The entries for this registry, from the daemon.json that `entrepot client` prints. It always prints it
    # for the first path of `_FILES`, even if docker on this machine uses another path.
    required = json.loads(target.content_for(_FILES[0]))
    for key in (_MIRRORS, _INSECURE):
        present_entries = (daemon or {}).get(key)
        other_entries = [
            entry
            for entry in (present_entries if isinstance(present_entries, list) else [])
            if entry not in required.get(key, []) and not (key == _MIRRORS and _is_useless(entry, target))
        ]
        if entries := [*required.get(key, []), *other_entries]:
            merged[key] = entries
    return json.dumps(merged, indent=2) + "\n"


def _is_useless(mirror: Any, target: TargetRegistry) -> bool:
    """Returns whether the entry `mirror` has to be removed: docker refuses it, or it names this registry, whose correct
    address `_corrected_content` adds."""
    if not isinstance(mirror, str) or not _is_valid_mirror(mirror):
        return True
    return target.differs_only_in_scheme(mirror) or target.is_at(mirror)


def _is_valid_mirror(mirror: str) -> bool:
    """Returns whether docker accepts `mirror` as a mirror's address."""
    try:
        parts = urlsplit(mirror)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.path in ("", "/") and not parts.query
