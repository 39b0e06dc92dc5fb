"""The doctor's checks of registries.yaml, the configuration file of k3s and RKE2. Each finding names the cause and the
lines to write."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from registry.cli.diagnosis.finding import Level
from registry.cli.diagnosis.probe import ProbeError, ProbeResult
from tests.unit.registry.cli.diagnosis.client_place import (
    CONFIG,
    PLAIN,
    SECURE,
    at_level,
    findings_of,
    problems_in,
    write_files,
)

K3S, K3S_GENERATED = "etc/rancher/k3s/registries.yaml", "var/lib/rancher/k3s/agent/etc/containerd/config.toml"
"""The file that people write, and the file of containerd that k3s generates when it starts."""
K3S_PROBLEMS = [
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
    ("mirrors: [docker.io]\n", "mirrors in /etc/rancher/k3s/registries.yaml is no mapping", "k3s does not start"),
]
"""The text of registries.yaml (None: no file), and parts of the finding."""


@pytest.mark.parametrize(("text", "problem_text", "reason_text"), K3S_PROBLEMS)
def test_k3s_findings(tmp_path: Path, text: str | None, problem_text: str, reason_text: str) -> None:
    """If registries.yaml does not lead to this registry, the finding says why. If the finding proposes a new
    text for the file, pulls of docker.io come through this registry after the text is written to it. The files that k3s
    generates are not checked."""
    write_files(tmp_path, **{K3S_GENERATED: "version = 3\n"})
    if text is not None:
        write_files(tmp_path, **{K3S: text})
    (finding,) = problems_in(findings_of("containerd", tmp_path))
    assert problem_text in finding.what
    assert reason_text in finding.why
    assert "restart k3s" in finding.next_step
    if finding.lines:
        assert finding.file == f"/{K3S}"
        write_files(tmp_path, **{K3S: finding.lines})
        findings = findings_of("containerd", tmp_path)
        assert not problems_in(findings)
        assert any("pulls of docker.io come through" in each.what for each in findings)


def test_k3s_keeps_other_settings(tmp_path: Path) -> None:
    """The file that a finding proposes keeps the other mirrors, the logins and the other endpoints. In its list of
    endpoints, this registry is the first."""
    auth = {"auth": {"username": "ann"}}
    old_settings = {
        "mirrors": {"docker.io": {"endpoint": ["https://m.example"], "rewrite": {"a": "b"}}, "quay.io": None},
        "configs": {"registry.example.com": auth},
    }
    write_files(tmp_path, **{K3S: json.dumps(old_settings)})
    answer = ProbeResult(SECURE, ProbeError.UNTRUSTED, "unable to get local issuer certificate")
    first, second = problems_in(findings_of("containerd", tmp_path, SECURE, answer=answer))
    assert "unable to get local issuer certificate" in second.why
    assert first.lines == second.lines
    assert yaml.safe_load(first.lines) == {
        "mirrors": {"docker.io": {"endpoint": [SECURE, "https://m.example"], "rewrite": {"a": "b"}}, "quay.io": None},
        "configs": {"registry.example.com": {**auth, "tls": {"ca_file": "/etc/rancher/entrepot-ca.crt"}}},
    }
    write_files(tmp_path, **{K3S: first.lines})
    assert not problems_in(findings_of("containerd", tmp_path, SECURE, answer=answer))


def test_k3s_order_restart_and_spelling(tmp_path: Path) -> None:
    """There are four warnings: for another endpoint before this registry, for a file that does not say that this
    registry uses plain HTTP, for a file that k3s has not read since it was changed, and for an unknown key."""
    text = f"mirrors:\n  docker.io: {{endpoint: [https://m.example, '{PLAIN}']}}\nmirror: {{}}\n"
    write_files(tmp_path, **{K3S: text, K3S_GENERATED: ""})
    os.utime(tmp_path / K3S_GENERATED, (1, 1))
    findings = findings_of("containerd", tmp_path)
    assert not problems_in(findings)
    warnings = [finding.what for finding in at_level(findings, Level.WARNING)]
    expected = ("before this registry", "speaks plain HTTP", "has changed since", "unknown key 'mirror'")
    assert [what in warning for what, warning in zip(expected, warnings, strict=True)] == [True] * 4


def test_k3s_and_containerd_on_the_same_machine(tmp_path: Path) -> None:
    """If a machine has both k3s and a containerd, each has its own findings. RKE2 has a file of its own."""
    lines = f"mirrors:\n  docker.io: {{endpoint: ['{SECURE}']}}\n"
    write_files(tmp_path, **{"etc/rancher/rke2/registries.yaml": lines})
    (finding,) = findings_of("containerd", tmp_path, SECURE)
    assert finding.what.endswith("(/etc/rancher/rke2/registries.yaml)")
    write_files(tmp_path, **{CONFIG: "version = 2\n"})
    assert "does not set config_path" in problems_in(findings_of("containerd", tmp_path, SECURE))[0].what
