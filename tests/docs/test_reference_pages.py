"""Tests that the reference pages are complete in both languages: they describe all settings, metrics, events, errors
and routes."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from book.pages import LANGUAGES, Language, page_file
from book.settings_catalogue import render_in_chinese, settings_messages, translations
from book.settings_page import render_settings_page
from registry.admin.store_metrics import StoreMetrics
from registry.config import Settings
from registry.events.envelopes import EVENT_FORMATTERS
from registry.http.error_statuses import STATUS_BY_ERROR
from registry.telemetry import distribution_names
from registry.telemetry.exposition import process_metrics
from registry.telemetry.metrics import Metrics
from storage.composition import prepare_data_dir
from storage.content import Actor
from storage.outbox import Event, EventAction, NewEvent
from tests.fakes.server_process import ROOT
from tests.system.admin.test_api_refusals import ROUTES, ROUTES_NOT_ONLY_FOR_ADMINS

pytestmark = pytest.mark.parametrize("language", LANGUAGES)
ADMIN = ("admin", "管理员")
"""The text in the column of http-api.md for a route that is for admins only, in both languages."""
PLACEHOLDERS = {
    "{name}": "NAME",
    "{tag}": "TAG",
    "{reference}": "REFERENCE",
    "{id}": "ID",
    "{job}": "ID",
    "{digest}": "DIGEST",
    "{member}": "MEMBER",
}


def rows(page: str, language: Language, start: str) -> list[list[str]]:
    """Returns the cells of each table row whose first cell begins with `start`."""
    lines = page_file(page, language).read_text().splitlines()
    return [[cell.strip() for cell in line.strip("| ").split(" |")] for line in lines if line.startswith(f"| {start}")]


def code(cell: str) -> list[str]:
    """Returns the texts in code style in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def test_settings(language: Language) -> None:
    """settings.md is the page that `make docs` generates, and all its texts are translated."""
    expected = render_settings_page() if language == "en" else render_in_chinese()
    assert page_file("settings", language).read_text() == expected
    translated = translations()
    assert [message for message in settings_messages() if message not in translated] == []
    if language == "zh":
        assert [message for message in settings_messages() if not translated[message]] == []


def metric_names() -> set[str]:
    """Returns the names of all metrics in the code of the registry."""
    sources = [file.read_text() for file in (ROOT / "registry").rglob("*.py")]
    names = {name for source in sources for name in re.findall(r'"(entrepot_[a-z_]+)"', source)}
    return {f"{name}_info" if name == "entrepot_build" else name for name in names}


def described_metrics(data: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yields the name, the type and the labels of the metrics that a server with an empty store has."""
    metrics = Metrics(["docker.io"], 1, webhooks=("ci",))
    metrics.start_worker()
    for family in metrics.plan.families:
        yield family.name, family.kind, list(family.labels)
    prepare_data_dir(data)
    for metric in [*process_metrics(metrics, 1.0), *StoreMetrics(Settings(data=data)).collect()]:
        if metric.type == "info":
            yield f"{metric.name}_info", "gauge", list(metric.samples[0].labels)
        else:
            yield metric.name, metric.type, list(getattr(metric, "_labelnames", ()))


def test_metrics(language: Language, tmp_path: Path) -> None:
    """metrics.md has a row for each metric, with its type and labels, and no rows for other metrics."""
    described = {
        code(name)[0]: (kind, code(labels)) for name, kind, labels, *_ in rows("metrics", language, "`entrepot_")
    }
    assert set(described) == metric_names()
    found = {name: (kind, labels) for name, kind, labels in described_metrics(tmp_path)}
    assert len(found) > 60
    assert {name: described[name] for name in found} == found


def test_names_of_distribution(language: Language) -> None:
    """metrics.md names all metrics that are also published under the names of CNCF Distribution."""
    source = inspect.getsource(distribution_names)
    text = page_file("metrics", language).read_text()
    names = re.findall(r'"(registry_(?:http|storage)_[a-z_]+)"', source)
    assert names
    assert [name for name in names if name not in text] == []


def test_events(language: Language) -> None:
    """events.md has a row for each action of an event, with its names in both formats of events."""
    described = {
        code(cells[0])[0]: [code(cell)[0] for cell in cells[1:3]]
        for cells in rows("events", language, "`")
        if len(cells) == 4
    }
    found = {}
    for action in EventAction:
        event = Event(1, "id", NewEvent(action, "team/app", 1.0, Actor(name="ci", address=""), tag="v1"))
        documents = {name: json.loads(make(event, "http://x")[1]) for name, make in EVENT_FORMATTERS.items()}
        found[str(action)] = [documents["cloudevents"]["type"], documents["distribution"]["events"][0]["action"]]
    assert described == found


def test_errors(language: Language) -> None:
    """errors.md has a row for each error code, with all statuses that a response with this code can have."""
    described = {
        code(cells[0])[0]: {int(number) for number in re.findall(r"\d{3}", cells[1])}
        for cells in rows("errors", language, "`")
        if len(cells) == 3 and re.fullmatch(r"[\d, ]+", cells[1])
    }
    found: dict[str, set[int]] = {}
    for error, status in STATUS_BY_ERROR.items():
        found.setdefault(error.code, set()).add(status)
    found["UNSUPPORTED"].add(422)  # the status for an invalid request body (registry.admin.middleware)
    assert described == found


def test_routes(language: Language) -> None:
    """http-api.md has a row for each route of the management API, and says which ones are for admins only."""
    described = {
        code(cells[0])[0]: cells[2] not in ADMIN
        for cells in rows("http-api", language, "`")
        if re.match(r"`(GET|PUT|POST|PATCH|DELETE) /(?!v2|token\b)", cells[0])
    }
    found = {}
    for method, path in ROUTES:
        name = re.sub(r"\{\w+\}", lambda part: PLACEHOLDERS[part[0]], path)
        found[f"{method} {name}"] = (method, path) in ROUTES_NOT_ONLY_FOR_ADMINS
    assert described == found
