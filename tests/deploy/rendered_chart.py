"""Renders the Helm chart, and makes the plain Kubernetes manifests of deploy/kubernetes from it.

Run `make manifests` after a change of the chart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import helm_python
import yaml

from tests.fakes.server_process import ROOT

CHART: Final = ROOT / "deploy" / "helm" / "entrepot"
PLAIN: Final = ROOT / "deploy" / "kubernetes"
NAMESPACE: Final = "registry"

Document = dict[str, Any]

WITHOUT_HELM: Final = {"existingSecret": "entrepot", "persistence": {"keep": False}, "restartOnConfigChange": False}
"""The chart values for the plain manifests. They switch off what needs Helm."""
_ONLY_HELM: Final = re.compile(r"# Source: |\s*(helm\.sh/|app\.kubernetes\.io/managed-by: |namespace: )")
"""Matches the lines of the rendered chart that the plain manifests leave out. kustomize sets the namespace."""
_KUSTOMIZATION: Final = """\
# kubectl apply --kustomize deploy/kubernetes
#
# The Secret `entrepot` must exist; its key admin-password is the password of the first account:
#   kubectl create secret generic entrepot --from-literal=admin-password='a long password'
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources:
"""


def render_texts(values: Mapping[str, Any] | None = None, name: str = "entrepot") -> dict[str, str]:
    """Returns the rendered text of each template by its file name. Raises `helm_python.HelmError`, also if the chart's
    schema refuses `values`."""
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(dict(values or {}))
        texts: dict[str, str] = chart.render(dict(values or {}), name=name, namespace=NAMESPACE)
    return {Path(path).name: text for path, text in texts.items()}


def render(values: Mapping[str, Any] | None = None, name: str = "entrepot") -> list[Document]:
    """Returns the rendered Kubernetes objects. Raises `helm_python.HelmError`."""
    texts = render_texts(values, name)
    return [found for file, text in texts.items() if file != "NOTES.txt" for found in documents(text)]


def documents(text: str) -> Iterator[Document]:
    """Yields the objects in a YAML file."""
    yield from (found for found in yaml.safe_load_all(text) if found)


def of_kind(objects: list[Document], kind: str, name: str | None = None) -> Document:
    """Returns the only object of this kind and name."""
    (found,) = [each for each in objects if each["kind"] == kind and name in (None, each["metadata"]["name"])]
    return found


def plain_manifests() -> dict[str, str]:
    """Returns the texts of the files in deploy/kubernetes by file name."""
    files = {}
    for name, text in sorted(render_texts(WITHOUT_HELM).items()):
        lines = [line for line in text.splitlines() if line.strip() and not _ONLY_HELM.match(line)]
        if name != "NOTES.txt" and any(lines):
            files[name] = "\n".join(lines) + "\n"
    return {"kustomization.yaml": _KUSTOMIZATION + "".join(f"  - {name}\n" for name in files), **files}


def main() -> None:
    """Writes the plain manifests."""
    for old in PLAIN.glob("*.yaml"):
        old.unlink()
    PLAIN.mkdir(exist_ok=True)
    for name, text in plain_manifests().items():
        (PLAIN / name).write_text(text)


if __name__ == "__main__":
    main()
