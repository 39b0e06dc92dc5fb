"""Reads the metrics of a server in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.plain_client import plain_request


@dataclass(frozen=True)
class Scrape:
    """The samples of one response of `/metrics`, each with its name, labels and value."""

    samples: list[tuple[str, dict[str, str], float]]

    def values(self, name: str, **labels: str) -> Iterator[tuple[dict[str, str], float]]:
        """Yields the labels and the value of each sample with this name and these labels."""
        for sample_name, sample_labels, value in self.samples:
            if sample_name == name and labels.items() <= sample_labels.items():
                yield sample_labels, value

    def total(self, name: str, **labels: str) -> float:
        """Returns the sum of all samples with this name and these labels."""
        return sum(value for _, value in self.values(name, **labels))


def scrape(url: str, path: str = "/metrics") -> Scrape:
    """Requests the metrics of a server. The server must allow this machine to read them."""
    answer = plain_request("GET", url + path, timeout=60.0)
    assert answer.status_code == 200, answer.text
    return parse(answer.text)


def parse(text: str) -> Scrape:
    """Returns the samples in the text of a response."""
    return Scrape(
        [
            (sample.name, dict(sample.labels), sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]
    )
