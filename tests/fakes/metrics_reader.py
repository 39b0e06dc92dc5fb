"""Reads metrics as Prometheus does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.plain_client import plain_request


@dataclass(frozen=True)
class Scrape:
    """What one answer of `/metrics` holds: the samples, each as its name, labels and value."""

    samples: list[tuple[str, dict[str, str], float]]

    def values(self, name: str, **labels: str) -> Iterator[tuple[dict[str, str], float]]:
        """The samples of that name that have these labels."""
        for found, with_labels, value in self.samples:
            if found == name and labels.items() <= with_labels.items():
                yield with_labels, value

    def total(self, name: str, **labels: str) -> float:
        """The sum over all samples of that name that have these labels."""
        return sum(value for _, value in self.values(name, **labels))


def scrape(url: str, path: str = "/metrics") -> Scrape:
    """The metrics of a server that lets this machine read them."""
    answer = plain_request("GET", url + path, timeout=60.0)
    assert answer.status_code == 200, answer.text
    return parse(answer.text)


def parse(text: str) -> Scrape:
    """The samples in the text of an answer."""
    return Scrape(
        [
            (sample.name, dict(sample.labels), sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]
    )
