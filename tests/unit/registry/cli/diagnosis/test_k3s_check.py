"""k3s and RKE2: each finding names the cause and what to write."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from registry.cli.diagnosis.finding import Level
from registry.cli.diagnosis.probe import ProbeError, ProbeResult
from tests.unit.registry.cli.diagnosis.client_place import CONFIG, PLAIN, SECURE, bad, found, write

K3S, K3S_WRITTEN = "etc/rancher/k3s/registries.yaml", "var/lib/rancher/k3s/agent/etc/containerd/config.toml"
K3S_FILES = [
    (None, "there is no /etc/rancher/k3s/registries.yaml", "from https://registry-1.docker.io"),
    ("mirrors:\n  ghcr.io:\n", "has no mirror for docker.io, and none for '*'", "from https://registry-1.docker.io"),
    ("mirrors:\n  docker.io:\n", "names no endpoint for docker.io", ""),
    (
        "mirrors:\n  '*':\n    endpoint: [https://registry.example.com:5000]\n",
        "names https://registry.example.com:5000, but the registry is at http://",
        "",
    ),
    ("mirrors:\n  docker.io: {endpoint: [m.example]}\n", "for docker.io, but https://m.example", "from https://m.exa"),
    ("mirrors: [", "is not valid YAML", "does not use the file"),
    ("mirrors: [docker.io]\n", "mirrors in /etc/rancher/k3s/registries.yaml is no table", "k3s does not start"),
]


@pytest.mark.parametrize(("text", "what", "why"), K3S_FILES)
def test_k3s(tmp_path: Path, text: str | None, what: str, why: str) -> None:
    """If registries.yaml does not lead to this registry, the finding says why. If the finding also proposes a new
    registries.yaml, that file leads to this registry. The files that k3s generates from it are not checked."""
    write(tmp_path, **{K3S_WRITTEN: "version = 3\n"})
    if text is not None:
        write(tmp_path, **{K3S: text})
    (finding,) = bad(found("containerd", tmp_path))
    assert what in finding.what
    assert why in finding.why
    assert "restart k3s" in finding.next_step
    if finding.lines:
        assert finding.file == f"/{K3S}"
        write(tmp_path, **{K3S: finding.lines})
        findings = found("containerd", tmp_path)
        assert not bad(findings)
        assert any("pulls of docker.io come through" in each.what for each in findings)


def test_k3s_keeps_other_settings(tmp_path: Path) -> None:
    """The file that a finding proposes keeps the other mirrors, the logins and the other endpoints. In its list of
    endpoints, this registry is the first."""
    auth = {"auth": {"username": "ann"}}
    before = {
        "mirrors": {"docker.io": {"endpoint": ["https://m.example"], "rewrite": {"a": "b"}}, "quay.io": None},
        "configs": {"registry.example.com": auth},
    }
    write(tmp_path, **{K3S: json.dumps(before)})
    answer = ProbeResult(SECURE, ProbeError.UNTRUSTED, "unable to get local issuer certificate")
    first, second = bad(found("containerd", tmp_path, SECURE, answer=answer))
    assert "unable to get local issuer certificate" in second.why
    assert first.lines == second.lines
    assert yaml.safe_load(first.lines) == {
        "mirrors": {"docker.io": {"endpoint": [SECURE, "https://m.example"], "rewrite": {"a": "b"}}, "quay.io": None},
        "configs": {"registry.example.com": {**auth, "tls": {"ca_file": "/etc/rancher/entrepot-ca.crt"}}},
    }
    write(tmp_path, **{K3S: first.lines})
    assert not bad(found("containerd", tmp_path, SECURE, answer=answer))


def test_k3s_order_restart_and_spelling(tmp_path: Path) -> None:
    """There is a warning for another endpoint before this registry, for a file that k3s has not read since it was
    changed, and for an unknown key. There is also one if the file does not say that this registry speaks plain HTTP."""
    text = f"mirrors:\n  docker.io: {{endpoint: [https://m.example, '{PLAIN}']}}\nmirror: {{}}\n"
    write(tmp_path, **{K3S: text, K3S_WRITTEN: ""})
    os.utime(tmp_path / K3S_WRITTEN, (1, 1))
    findings = found("containerd", tmp_path)
    assert not bad(findings)
    warnings = [finding.what for finding in bad(findings, Level.WARNING)]
    expected = ("before this registry", "speaks plain HTTP", "is newer than", "unknown key 'mirror'")
    assert [what in text for what, text in zip(expected, warnings, strict=True)] == [True] * 4


def test_k3s_beside_a_containerd(tmp_path: Path) -> None:
    """If a machine has both k3s and a containerd, each has its own findings. RKE2 has a file of its own."""
    lines = f"mirrors:\n  docker.io: {{endpoint: ['{SECURE}']}}\n"
    write(tmp_path, **{"etc/rancher/rke2/registries.yaml": lines})
    (finding,) = found("containerd", tmp_path, SECURE)
    assert finding.what.endswith("(/etc/rancher/rke2/registries.yaml)")
    write(tmp_path, **{CONFIG: "version = 2\n"})
    assert "does not set config_path" in bad(found("containerd", tmp_path, SECURE))[0].what
