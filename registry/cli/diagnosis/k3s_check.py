"""Checks in the file `registries.yaml` whether k3s or RKE2 on a machine pulls through this registry.

k3s and RKE2 contain their own containerd. At each start, they generate containerd's `config.toml` and `hosts.toml` from
`registries.yaml`. So only `registries.yaml` is ever edited.

Sources: k3s docs, "Private Registry Configuration"; RKE2 docs, "Containerd Registry Configuration".
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from registry.cli.diagnosis.client_files import ClientFiles, FileUnusable, TargetRegistry
from registry.cli.diagnosis.finding import Finding, ok, problem, warning
from registry.clients.client_setup import MirroredHost

CHECK = "containerd"
_CA_FILE = "/etc/rancher/entrepot-ca.crt"
_EVERY_HOST = "*"
"""The key in `mirrors` whose entry applies to every host without an entry of its own."""


@dataclass(frozen=True, slots=True)
class KubernetesDistribution:
    """A distribution of Kubernetes. `file`: the path of its `registries.yaml`. `generated_file`: the path of the
    `config.toml` that the distribution generates from `file`. `restart`: the command that restarts the distribution."""

    name: str
    file: str
    generated_file: str
    restart: str


DISTRIBUTIONS = (
    KubernetesDistribution(
        "k3s",
        "/etc/rancher/k3s/registries.yaml",
        "/var/lib/rancher/k3s/agent/etc/containerd/config.toml",
        "systemctl restart k3s (on agents: k3s-agent)",
    ),
    KubernetesDistribution(
        "RKE2",
        "/etc/rancher/rke2/registries.yaml",
        "/var/lib/rancher/rke2/agent/etc/containerd/config.toml",
        "systemctl restart rke2-server (on agents: rke2-agent)",
    ),
)


def distributions_on(files: ClientFiles) -> list[KubernetesDistribution]:
    """Returns the distributions whose `file` or `generated_file` exists on the machine."""
    return [
        distribution
        for distribution in DISTRIBUTIONS
        if files.first_existing(distribution.file, distribution.generated_file) is not None
    ]


def check_k3s(files: ClientFiles, target: TargetRegistry, distribution: KubernetesDistribution) -> list[Finding]:
    """Checks `registries.yaml` of a distribution. Returns the findings: what is right or wrong, with the next step.
    `target`: describes this registry."""
    file = distribution.file
    try:
        document = replace(files, program=distribution.name).read_yaml(file)
        mirrors, configs = _mapping(distribution, document, "mirrors"), _mapping(distribution, document, "configs")
    except FileUnusable as error:
        return [error.finding]
    step = f"write this to {file}, then run: {distribution.restart}"
    new_content = _corrected_content(document or {}, target)
    findings = [_mirror_finding(distribution, document, mirrors, host, target, new_content) for host in target.hosts]
    findings += _registry_host_findings(distribution, mirrors, configs, target, new_content)
    changed_at = files.modification_time(file)
    if changed_at is not None and changed_at > (files.modification_time(distribution.generated_file) or changed_at):
        what = f"{file} has changed since {distribution.name} last started"
        why = f"{distribution.name} reads the file only when it starts"
        findings.append(warning(CHECK, what, why, f"run: {distribution.restart}"))
    for key in document or {}:
        if key not in ("mirrors", "configs", "auths"):
            why = f"{distribution.name} does not read this key; the usual keys are mirrors and configs"
            findings.append(
                warning(CHECK, f"{file} has the unknown key {key!r}", why, step, file=file, lines=new_content)
            )
    return findings


def _mirror_finding(
    distribution: KubernetesDistribution,
    document: dict[str, Any] | None,
    mirrors: dict[str, Any],
    host: MirroredHost,
    target: TargetRegistry,
    new_content: str,
) -> Finding:
    """Returns a finding that says whether containerd pulls the images of `host` through the registry. `new_content`:
    the content that the file should have (`_corrected_content`)."""
    file = distribution.file
    step = f"write this to {file}, then run: {distribution.restart}"
    name = host.prefix if host.prefix in mirrors else _EVERY_HOST
    endpoints = _endpoints(mirrors.get(name))
    position = next((number for number, url in enumerate(endpoints) if target.is_at(url)), None)
    if position == 0:
        return ok(CHECK, f"pulls of {host.prefix} come through {target.address.url} ({file})")
    if position is not None:
        what = f"{file} names {endpoints[0]} before this registry, for {name}"
        why = f"containerd asks this registry only if {endpoints[0]} fails"
        return warning(CHECK, what, why, step, file=file, lines=new_content)
    if document is None:
        what = f"there is no {file}"
    elif name not in mirrors:
        what = f"{file} has no mirror for {host.prefix}, and none for {_EVERY_HOST!r}"
    elif not endpoints:
        what = f"{file} names no endpoint for {name}"
    elif wrong_url := next((url for url in endpoints if target.differs_only_in_scheme(url)), None):
        what = f"{file} names {wrong_url}, but the registry is at {target.address.url}"
    else:
        what = f"{file} does not name this registry for {name}, but {', '.join(endpoints)}"
    why = f"{distribution.name} pulls images of {host.prefix} from {', '.join(endpoints) or host.server}"
    return problem(CHECK, what, why, step, file=file, lines=new_content)


def _registry_host_findings(
    distribution: KubernetesDistribution,
    mirrors: dict[str, Any],
    configs: dict[str, Any],
    target: TargetRegistry,
    new_content: str,
) -> Iterator[Finding]:
    """Checks the file's entries for the registry's own host. Yields one finding if the file has to say that the
    registry speaks plain HTTP, and does not. Yields one finding if this machine does not trust the registry's
    certificate, and the file names no authority for it. `new_content`: the content that the file should have."""
    address, file = target.address, distribution.file
    step = f"write this to {file}, then run: {distribution.restart}"
    if _needs_http_entry(target) and not any(target.is_at(url) for url in _endpoints(mirrors.get(address.host))):
        what = f"{file} does not say that {address.host} speaks plain HTTP"
        why = f"containerd expects TLS from {address.host} when it pulls images whose names begin with {address.host}"
        yield warning(CHECK, what, why, step, file=file, lines=new_content)
    config = configs.get(address.host)
    tls = config.get("tls") if isinstance(config, dict) else None
    if target.needs_ca and not (isinstance(tls, dict) and (tls.get("ca_file") or tls.get("insecure_skip_verify"))):
        what = f"this machine does not trust the certificate of {address.host}, and {file} names no authority for it"
        why = target.probe_result.detail if target.probe_result else ""
        step = f"copy the authority's certificate to {_CA_FILE}, and {step}"
        yield problem(CHECK, what, why, step, file=file, lines=new_content)


def _endpoints(mirror: Any) -> list[str]:
    """Returns the endpoints of a mirror as URLs. An endpoint without a scheme becomes an `https` URL."""
    urls = mirror.get("endpoint") if isinstance(mirror, dict) else None
    texts = [str(url) for url in urls] if isinstance(urls, list) else []
    return [url if "://" in url else f"https://{url}" for url in texts]


def _mapping(distribution: KubernetesDistribution, document: dict[str, Any] | None, key: str) -> dict[str, Any]:
    """Returns the mapping under `key` in the file; an empty one if the key is missing. Raises FileUnusable if the value
    is not a mapping."""
    mapping = (document or {}).get(key)
    if mapping is not None and not isinstance(mapping, dict):
        what, why = f"{key} in {distribution.file} is no mapping", f"{distribution.name} does not start with this file"
        step = f"correct the file, then run: {distribution.restart}"
        raise FileUnusable(problem(CHECK, what, why, step))
    return mapping or {}


def _corrected_content(document: dict[str, Any], target: TargetRegistry) -> str:
    """Returns the whole content that the file should have: the present content without unknown keys, plus the missing
    entries for this registry."""
    import yaml

    merged = {key: copy.deepcopy(value) for key, value in document.items() if key in ("mirrors", "configs", "auths")}
    address, mirrors = target.address, merged.get("mirrors") or {}
    names = [host.prefix for host in target.hosts] + ([address.host] if _needs_http_entry(target) else [])
    for name in names:
        other_urls = [url for url in _endpoints(mirrors.get(name)) if not _has_registry_host(url, target)]
        present_mirror = mirrors.get(name)
        mirrors[name] = {
            **(present_mirror if isinstance(present_mirror, dict) else {}),
            "endpoint": [address.url, *other_urls],
        }
    merged["mirrors"] = mirrors
    if target.needs_ca:
        configs = merged["configs"] = merged.get("configs") or {}
        config = configs.get(address.host)
        configs[address.host] = {**(config if isinstance(config, dict) else {}), "tls": {"ca_file": _CA_FILE}}
    return str(yaml.safe_dump(merged, sort_keys=False))


def _needs_http_entry(target: TargetRegistry) -> bool:
    """Returns whether `mirrors` needs an entry that says that the registry speaks plain HTTP. containerd expects plain
    HTTP from `localhost` and 127.0.0.0/8, and TLS from all other hosts. docker accepts plain HTTP from the same hosts,
    so `docker_accepts_plain_http` also tells what containerd expects."""
    return target.address.is_plain_http and not target.address.docker_accepts_plain_http


def _has_registry_host(url: str, target: TargetRegistry) -> bool:
    return target.is_at(url) or target.differs_only_in_scheme(url)
