"""Tests of the alerts and the dashboard with Debian's Prometheus and its promtool."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.monitored_site import DEADLINE_SECONDS, RULES, MonitoredSite, monitored_site
from tests.fakes.server_process import ROOT

CASES = RULES.with_name("alerts.test.yml")
RUNBOOK = ROOT / "docs" / "en" / "alerts.md"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "entrepot.json").read_text())
ALERTS: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

MAY_BE_EMPTY = {
    ("Running fetches", "A"): "no blob is being fetched any more",
    ("Running jobs", "A"): "no job is running any more",
    ("Endpoints that are left out", "A"): "no endpoint has failed often enough",
    ("Lost events", "A"): "an event is lost only if more than 100,000 events wait for their delivery",
}
"""Queries of the dashboard that have no data after the work of the test, with the reason. The keys are the panel's
title and the letter of the query. A series exists only after its first count."""


def promtool(*arguments: str) -> None:
    """Runs promtool in the folder of the alert rules. Raises AssertionError with its output if it fails."""
    done = subprocess.run(["promtool", *arguments], cwd=RULES.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules() -> None:
    """The alert rules have no syntax errors, also in the templates of their texts."""
    promtool("check", "rules", RULES.name)


def test_alerts_fire_when_they_should() -> None:
    """The alerts fire in the cases of alerts.test.yml in which they should, and in no others."""
    promtool("test", "rules", CASES.name)


def test_each_alert_has_cases() -> None:
    """Each alert fires in at least one case of alerts.test.yml."""
    text = CASES.read_text()
    fired = set(re.findall(r'ALERTS{alertname="(\w+)"', text))
    for case in yaml.safe_load(text)["tests"]:
        fired |= {test["alertname"] for test in case.get("alert_rule_test", ()) if test["exp_alerts"]}
    assert fired == {alert["alert"] for alert in ALERTS}


def test_each_alert_has_a_section_in_the_runbook() -> None:
    """The runbook has exactly one section for each alert, and the alert's annotation links to this section. Each alert
    has a summary, a description and a severity."""
    sections = re.findall(r"^### (Entrepot\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert sorted(sections) == sorted(alert["alert"] for alert in ALERTS)
    for alert in ALERTS:
        assert alert["annotations"]["runbook"] == f"docs/en/alerts.md#{alert['alert'].lower()}"
        assert {"summary", "description"} < alert["annotations"].keys()
        assert alert["labels"]["severity"] in ("critical", "warning", "info")


def test_the_dashboard_is_valid() -> None:
    """Panels have different ids and do not overlap. Each query uses the chosen data source and the chosen instances."""
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    used_cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        rows, columns = range(grid["y"], grid["y"] + grid["h"]), range(grid["x"], grid["x"] + grid["w"])
        cells = {(row, column) for row in rows for column in columns}
        assert columns.stop <= 24  # the width of Grafana's grid
        assert not cells & used_cells, panel["title"]
        used_cells |= cells
    for panel in PANELS:
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert 'instance=~"$instance"' in target["expr"], panel["title"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredSite]:
    """Runs a registry that has done some work of every kind, and a Prometheus that scrapes its metrics."""
    with monitored_site(tmp_path_factory.mktemp("monitored")) as running:
        yield running


def queries() -> Iterator[tuple[tuple[str, str], str]]:
    """Yields the queries of the dashboard with values for Grafana's variables. Each comes with its panel's title and
    its letter."""
    for panel in PANELS:
        for target in panel["targets"]:
            expression = target["expr"].replace("$instance", ".*").replace("$__rate_interval", "1m")
            assert "$" not in expression
            yield (panel["title"], target["refId"]), expression


def test_each_panel_has_data(site: MonitoredSite) -> None:
    """Each query of the dashboard returns data, except those about events that did not happen in the test."""
    missing = dict(queries())
    deadline = time.monotonic() + DEADLINE_SECONDS
    while missing.keys() - MAY_BE_EMPTY.keys() and time.monotonic() < deadline:
        time.sleep(0.2)
        missing = {key: expression for key, expression in missing.items() if not site.query(expression)}
    assert missing.keys() <= MAY_BE_EMPTY.keys(), [missing[key] for key in missing.keys() - MAY_BE_EMPTY.keys()]


def test_the_metrics_exist(site: MonitoredSite) -> None:
    """All metrics in the alerts and the dashboard are metrics of the registry."""
    names = {"up"}
    for family in text_string_to_metric_families(site.exposition):
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    expressions = [alert["expr"] for alert in ALERTS] + [expression for _, expression in queries()]
    used = {name for text in expressions for name in re.findall(r"\b(?:up|entrepot_\w+)\b", text)}
    assert used - names == set()


def test_prometheus_evaluates_the_rules(site: MonitoredSite) -> None:
    """Prometheus evaluates all rules without errors, and no critical alert is active. Before its first scrape,
    Prometheus has no target, so one critical alert is pending for a moment. The test waits until this is over."""

    def is_settled(rule: dict[str, Any]) -> bool:
        return rule["health"] != "unknown" and not (
            rule["labels"]["severity"] == "critical" and rule["state"] == "pending"
        )

    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        (group,) = site.ask("rules")["groups"]
        if all(map(is_settled, group["rules"])):
            break
        time.sleep(0.2)
        assert time.monotonic() < deadline, group
    assert [rule["name"] for rule in group["rules"] if rule["health"] != "ok"] == []
    assert {rule["name"] for rule in group["rules"]} == {alert["alert"] for alert in ALERTS}
    critical = [rule for rule in group["rules"] if rule["labels"]["severity"] == "critical"]
    assert [rule["name"] for rule in critical if rule["state"] != "inactive"] == []
