"""Tests of the Helm chart, which is rendered by Helm's own engine, and of the plain manifests that are made from it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml

from registry import __version__
from registry.config.settings_sources import load_settings
from tests.deploy.custom_resources import CUSTOM_RESOURCES
from tests.deploy.pod_run import PodRun
from tests.deploy.rendered_chart import (
    CHART,
    PLAIN,
    Document,
    documents,
    of_kind,
    plain_manifests,
    render,
    render_texts,
)
from tests.fakes.plain_client import plain_request
from tests.fakes.server_process import ROOT
from tests.fakes.temporary_files import memory_root

OLDEST, NEWEST = "1.25", kubernetes_validate.latest_version()
"""Versions of Kubernetes: the oldest that Chart.yaml allows, and the newest whose schemas are installed."""
PASSWORD = "correct horse battery"

TEAM: dict[str, Any] = {
    "existingSecret": "entrepot-secrets",
    "image": {"repository": "registry.example.net/entrepot", "digest": f"sha256:{'ab' * 32}"},
    "imagePullSecrets": [{"name": "pull"}],
    "config": {"trusted_proxies": ["10.0.0.0/8"], "retention": [{"repositories": "team/**", "keep_last": 20}]},
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "hosts": [{"host": "registry.example.com", "paths": [{"path": "/"}]}],
        "tls": [{"secretName": "registry-tls", "hosts": ["registry.example.com"]}],
    },
    "persistence": {"storageClass": "fast", "size": "200Gi", "accessMode": "ReadWriteOncePod"},
    "serviceMonitor": {"enabled": True, "labels": {"release": "stack"}},
    "prometheusRules": {
        "enabled": True,
        "labels": {"release": "stack"},
        "runbookUrl": "https://docs.example.com/alerts",
    },
    "grafanaDashboard": {"enabled": True},
    "pdb": {"enabled": True},
    "resources": {"limits": {"memory": "2Gi"}},
    "nodeSelector": {"disk": "local"},
    "tolerations": [{"key": "registry", "operator": "Exists"}],
    "commonLabels": {"team": "platform"},
}
ACCELERATOR: dict[str, Any] = {
    "admin": {"enabled": False},
    "config": {"insecure_open": True, "mirror": ["docker.io"]},
    "httproute": {
        "enabled": True,
        "parentRefs": [{"name": "gateway", "namespace": "gateways", "sectionName": "https"}],
        "hostnames": ["mirror.example.com"],
        "timeouts": {"request": "0s"},
    },
    "metrics": {"enabled": True},
    "networkPolicy": {"enabled": True, "from": [{"namespaceSelector": {"matchLabels": {"team": "a"}}}]},
    "persistence": {"existingClaim": "old-data"},
    "serviceAccount": {"create": False},
    "tls": {"secretName": "registry-tls"},
    "service": {"type": "LoadBalancer", "port": 443, "externalTrafficPolicy": "Local"},
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy.example.com:3128"}],
    "extraVolumes": [{"name": "backups", "persistentVolumeClaim": {"claimName": "backups"}}],
    "extraVolumeMounts": [{"name": "backups", "mountPath": "/backups"}],
    "podAnnotations": {"example.com/a": "b"},
}
USUAL_KINDS = {"ConfigMap", "Service", "StatefulSet"}
VARIANTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "default": ({}, USUAL_KINDS | {"Secret", "ServiceAccount", "PersistentVolumeClaim"}),
    "team": (
        TEAM,
        USUAL_KINDS
        | {"ServiceAccount", "PersistentVolumeClaim", "Ingress", "ServiceMonitor", "PrometheusRule"}
        | {"PodDisruptionBudget"},
    ),
    "accelerator": (ACCELERATOR, USUAL_KINDS | {"HTTPRoute", "NetworkPolicy"}),
}
"""For each variant of the chart: its values, and the kinds of the rendered objects."""


def validate(found: Document, version: str) -> None:
    """Raises an error if Kubernetes would reject the object or ignore one of its fields."""
    if (schema := CUSTOM_RESOURCES.get(found["kind"])) is not None:
        jsonschema.validate(found, schema)
    else:
        kubernetes_validate.validate(found, version, strict=True)


@pytest.fixture(params=VARIANTS)
def rendered_variant(request: pytest.FixtureRequest) -> tuple[list[Document], set[str]]:
    """Returns the rendered objects of one of the variants, and the expected kinds of objects."""
    values, kinds = VARIANTS[request.param]
    return render(values), kinds


def test_kubernetes_accepts_each_object(rendered_variant: tuple[list[Document], set[str]]) -> None:
    """The oldest and the newest version of Kubernetes accept each object, and know all its fields."""
    objects, kinds = rendered_variant
    assert {found["kind"] for found in objects} == kinds
    for found in objects:
        for version in (OLDEST, NEWEST):
            validate(found, version)


def test_references_between_objects_are_valid(rendered_variant: tuple[list[Document], set[str]]) -> None:
    """All references between the objects are valid: mounts name existing volumes, Services and probes name existing
    ports, selectors match the pod, and backends are ports of a Service."""
    objects, _ = rendered_variant
    workload = of_kind(objects, "StatefulSet")
    pod, labels = workload["spec"]["template"]["spec"], workload["spec"]["template"]["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in [*pod.get("initContainers", ()), *pod["containers"]]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    ports = {port["name"] for port in pod["containers"][0]["ports"]}
    for service in (found for found in objects if found["kind"] == "Service"):
        assert service["spec"]["selector"].items() <= labels.items()
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert pod["containers"][0][probe]["httpGet"]["port"] in ports
    backends = [
        *re.findall(r'"backend": {"service": {"name": "([^"]+)", "port": {"number": (\d+)}}}', json.dumps(objects)),
        *re.findall(r'"backendRefs": \[{"name": "([^"]+)", "port": (\d+)}\]', json.dumps(objects)),
    ]
    for name, number in backends:
        assert int(number) in [port["port"] for port in of_kind(objects, "Service", name)["spec"]["ports"]]
    for monitor in (found for found in objects if found["kind"] == "ServiceMonitor"):
        selected = of_kind(objects, "Service", "entrepot-metrics")
        assert monitor["spec"]["selector"]["matchLabels"].items() <= selected["metadata"]["labels"].items()
        assert monitor["spec"]["endpoints"][0]["port"] == selected["spec"]["ports"][0]["name"]


def test_the_pod_is_restricted(rendered_variant: tuple[list[Document], set[str]]) -> None:
    """The pod meets the level `restricted` of the Pod Security Standards: it does not run as root, and has no
    capabilities and no privileges."""
    pod = of_kind(rendered_variant[0], "StatefulSet")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all({"hostPath"}.isdisjoint(volume) for volume in pod["volumes"])
    for container in [*pod.get("initContainers", ()), *pod["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("values", [values for values, _ in VARIANTS.values()], ids=VARIANTS)
def test_helm_lint_finds_no_problem(values: dict[str, Any]) -> None:
    """`helm lint --strict` reports no warnings and no errors."""
    report = helm_python.lint(CHART, values, strict=True)
    assert [message for message in report["messages"] if message["severity"] > 1] == []
    assert report["errors"] == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two pods": ({"replicaCount": 2}, "one pod at a time may use"),
    "the address": ({"config": {"listen": "0.0.0.0:80"}}, "use listenAddress and service.port"),
    "the data directory": ({"config": {"data": "/data"}}, "the volume is mounted at /var/lib/entrepot"),
    "the metrics' address": ({"config": {"metrics": {"listen": "0.0.0.0:1"}}}, "use metrics.enabled and metrics.port"),
    "TLS": ({"config": {"tls": {"certificate": "/a"}}}, "use tls.secretName"),
    "open with an account": ({"config": {"insecure_open": True}}, "Set admin.enabled to false"),
    "a route without a gateway": ({"httproute": {"enabled": True}}, "needs httproute.parentRefs"),
    "an unknown value": ({"replicas": 1}, "replicas"),
    "a wrong type": ({"service": {"port": "http"}}, "port"),
    "a shared volume": ({"persistence": {"accessMode": "ReadWriteMany"}}, "accessMode"),
}


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_values_are_refused(values: dict[str, Any], message: str) -> None:
    """Values that cannot work are refused. The error names the value or says what to do."""
    with pytest.raises(helm_python.HelmError, match=re.escape(message)):
        render(values)


def test_settings_written_as_yaml(tmp_path: Path) -> None:
    """The chart writes the values under `config` to a settings file. Entrepot reads the same settings from this file:
    numbers, texts, lists and tables."""
    config = {
        "workers": 3,
        "public_url": "https://registry.example.com",
        "trusted_proxies": ["10.0.0.0/8", "fd00::/8"],
        "delete": False,
        "gc": {"grace": "36h", "interval": 1800},
        "disk": {"min_free": "10GiB", "min_free_percent": 7},
        "cache": {"max": 1234567890123},
        "hosted": {"prefixes": ["team/**"]},
        "upstream": [
            {"name": "docker.io", "default": True, "tag_ttls": {"v*": "1h", "*-nightly": "1m"}, "connections": 12},
            {"name": "ghcr.io", "username": 'some"body\\', "password_env": "PASSWORD"},
        ],
        "webhook": [{"name": "ci", "url": "https://ci.example.com/hook", "max_attempts": 3}],
    }
    (tmp_path / "entrepot.toml").write_text(of_kind(render({"config": config}), "ConfigMap")["data"]["entrepot.toml"])
    settings = load_settings({}, tmp_path / "entrepot.toml").settings
    expected = load_settings(config).settings
    assert settings == expected
    assert (settings.workers, settings.disk.min_free_percent, settings.upstream[0].connections) == (3, 7, 12)


@pytest.mark.parametrize(
    ("values", "url"),
    [
        ({}, None),
        ({"ingress": TEAM["ingress"]}, "https://registry.example.com"),
        ({"ingress": {"enabled": True}}, "http://registry.example.com"),
        ({"httproute": ACCELERATOR["httproute"]}, "https://mirror.example.com"),
        ({"httproute": ACCELERATOR["httproute"], "config": {"public_url": "https://a.example.com"}}, None),
    ],
)
def test_the_address_of_the_registry(values: dict[str, Any], url: str | None) -> None:
    """The public URL of the registry comes from the Ingress or the HTTPRoute, unless the settings have it."""
    pod = of_kind(render(values), "StatefulSet")["spec"]["template"]["spec"]
    variables = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    assert variables.get("ENTREPOT_PUBLIC_URL") == url


def test_a_changed_setting_replaces_the_pod() -> None:
    """A change of `config` changes the pod's template, so that Kubernetes replaces the pod. Other values do not change
    it, and neither does `config` with `restartOnConfigChange: false`."""

    def template(**values: Any) -> Any:
        return of_kind(render({"existingSecret": "s", **values}), "StatefulSet")["spec"]["template"]

    changed = {"gc": {"grace": "1h"}}
    assert template() != template(config=changed)
    assert template() == template(service={"port": 80})
    assert template(restartOnConfigChange=False) == template(restartOnConfigChange=False, config=changed)


def test_alerts_are_those_of_the_file() -> None:
    """The PrometheusRule has the alerts of deploy/prometheus/alerts.yml, except those that the values disable. If the
    values have the URL of a runbook, each alert has a link to it."""
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"]
    assert of_kind(render({"prometheusRules": {"enabled": True}}), "PrometheusRule")["spec"]["groups"] == groups
    values = {"enabled": True, "disabled": ["EntrepotSlow"], "runbookUrl": "https://docs.example.com/alerts"}
    rules = of_kind(render({"prometheusRules": values}), "PrometheusRule")["spec"]["groups"][0]["rules"]
    assert [rule["alert"] for rule in rules] == [r["alert"] for r in groups[0]["rules"] if r["alert"] != "EntrepotSlow"]
    assert rules[0]["annotations"]["runbook_url"] == "https://docs.example.com/alerts#entrepotdown"


def test_the_dashboard_is_that_of_the_file() -> None:
    """The ConfigMap for Grafana has deploy/grafana/dashboards/entrepot.json."""
    found = of_kind(render({"grafanaDashboard": {"enabled": True}}), "ConfigMap", "entrepot-dashboard")
    file = ROOT / "deploy" / "grafana" / "dashboards" / "entrepot.json"
    assert json.loads(found["data"]["entrepot.json"]) == json.loads(file.read_text())


def test_a_package_has_all_files(tmp_path: Path) -> None:
    """A package of the chart has all files, including the alerts and the dashboard, which are symbolic links in the
    repository. The package and the folder render to the same texts."""
    package = helm_python.package(CHART, destination=tmp_path)
    with tarfile.open(package) as archive:
        assert all(member.isfile() for member in archive.getmembers())
    values = {**TEAM, "grafanaDashboard": {"enabled": True}}
    with helm_python.Chart.load(package) as chart:
        packed = chart.render(values, name="entrepot", namespace="registry")
    assert {Path(name).name: text for name, text in packed.items()} == render_texts(values)


def test_notes_say_how_to_log_in() -> None:
    """The notes that Helm prints after the installation have the login command with the registry's address, and the
    name of the Secret with the password."""
    notes = render_texts(TEAM)["NOTES.txt"]
    assert "docker login registry.example.com --username admin" in notes
    assert "get secret entrepot-secrets" in notes
    assert "port-forward service/entrepot 5000:5000" in render_texts()["NOTES.txt"]
    assert "trusted_proxies is not set" in render_texts({"ingress": {"enabled": True}})["NOTES.txt"]


def test_the_versions_are_those_of_entrepot() -> None:
    """The appVersion of the chart, which is the default tag of the image, is the version of this repository."""
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__


def value_names(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the names of the chart's values. A value in a group has the group as a prefix, such as `ingress.`."""
    for name, value in values.items():
        if isinstance(value, dict) and value and not prefix and name not in KUBERNETES_VALUES:
            yield from value_names(value, f"{name}.")
        else:
            yield prefix + name


KUBERNETES_VALUES = {
    "podSecurityContext",
    "securityContext",
    "resources",
    "startupProbe",
    "livenessProbe",
    "readinessProbe",
}
"""Values that the chart copies into Kubernetes objects as a whole. Their members are not values of the chart."""


def test_the_readme_has_each_value() -> None:
    """The README of the chart describes all values of the chart, and no others."""
    names = set(value_names(yaml.safe_load((CHART / "values.yaml").read_text())))
    rows = re.findall(r"^\| (`.+?) \|", (CHART / "README.md").read_text(), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} == names


def test_plain_manifests_are_those_of_the_chart() -> None:
    """deploy/kubernetes has the manifests that `make manifests` generates from the chart."""
    assert {path.name: path.read_text() for path in PLAIN.glob("*.yaml")} == plain_manifests()


GUIDE = re.findall(
    r"^```yaml\n(.+?)^```", (ROOT / "docs" / "en" / "kubernetes.md").read_text(), re.MULTILINE | re.DOTALL
)
"""The blocks of YAML in the guide docs/en/kubernetes.md: values for the chart, and an overlay for kustomize."""
(OVERLAY,) = (text for text in GUIDE if text.startswith("# kustomization.yaml"))


@pytest.mark.parametrize(
    "text", [text for text in GUIDE if text != OVERLAY], ids=lambda text: next(iter(yaml.safe_load(text)))
)
def test_the_values_in_the_guide(tmp_path: Path, text: str) -> None:
    """The chart can be rendered with each block of values in docs/en/kubernetes.md. Kubernetes accepts the objects, and
    Entrepot accepts the settings."""
    objects = render(yaml.safe_load(text))
    for found in objects:
        validate(found, NEWEST)
    (tmp_path / "entrepot.toml").write_text(of_kind(objects, "ConfigMap", "entrepot")["data"]["entrepot.toml"])
    assert load_settings({}, tmp_path / "entrepot.toml").warnings == ()


def test_plain_manifests_build(tmp_path: Path) -> None:
    """`kubectl kustomize` combines the plain manifests with the overlay of the guide, and Kubernetes accepts the
    objects."""
    (tmp_path / "entrepot" / "deploy").mkdir(parents=True)
    (tmp_path / "entrepot" / "deploy" / "kubernetes").symlink_to(PLAIN)
    (tmp_path / "kustomization.yaml").write_text(OVERLAY)
    kubectl = Path(sys.executable).with_name("kubectl")
    built = subprocess.run([kubectl, "kustomize", tmp_path], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    objects = list(documents(built.stdout))
    for found in objects:
        validate(found, NEWEST)
    container = of_kind(objects, "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "registry.example.net/entrepot:0.1.0"
    assert of_kind(objects, "PersistentVolumeClaim")["spec"]["resources"]["requests"]["storage"] == "200Gi"


@pytest.fixture
def pod_folder() -> Iterator[Path]:
    """Yields a folder that every user can enter. Other users cannot enter pytest's own temporary folders."""
    created = Path(tempfile.mkdtemp(prefix="entrepot-pod-", dir=memory_root()))
    created.chmod(0o755)
    yield created
    shutil.rmtree(created)


def test_the_pod_runs(pod_folder: Path) -> None:
    """The pod of the chart starts the registry on a new volume. The pod's user can write only files of its group. The
    first account can log in, and the probes succeed. Before a second start, the init containers add no account."""
    objects = render({"config": {"workers": 1}})
    pod = of_kind(objects, "StatefulSet")["spec"]["template"]["spec"]
    run = PodRun(pod_folder, pod, of_kind(objects, "ConfigMap")["data"], {"admin-password": PASSWORD})
    assert "admin is added, an admin" in run.run_init_containers()
    with run.running() as url:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            path = pod["containers"][0][probe]["httpGet"]["path"]
            assert plain_request("GET", url + path).status_code == 200
        assert plain_request("GET", f"{url}/v2/").status_code == 401
        assert plain_request("GET", f"{url}/v2/", auth=("admin", PASSWORD)).status_code == 200
    assert "is not added" in run.run_init_containers()
