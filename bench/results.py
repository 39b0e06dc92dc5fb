"""The samples of a run, and the JSON they are kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.figures import STOLEN, Figure, Sample, ratio, spread

FOLDER = Path(__file__).resolve().parent / "results"


@dataclass
class Line:
    """A row of the table with all its samples."""

    name: str
    title: str
    figures: tuple[Figure, ...]
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """By server."""
    failure: str = ""
    """Why there are no more of them."""

    def values(self, server: str, figure: Figure) -> list[float]:
        return [sample[figure.key] for sample in self.samples.get(server, []) if figure.key in sample]

    def median(self, server: str, key: str) -> float | None:
        """None: there is no sample."""
        values = [sample[key] for sample in self.samples.get(server, []) if key in sample]
        return spread(values).median if values else None

    def ratio(self, ours: str, theirs: str, key: str) -> float | None:
        """Of the medians; None where one has no sample."""
        values = [[sample[key] for sample in self.samples.get(one, []) if key in sample] for one in (ours, theirs)]
        return ratio(*values) if all(values) else None


def as_json(lines: Sequence[Line], subjects: Sequence[str], about: Mapping[str, object]) -> dict[str, object]:
    """Everything: how it was measured, medians and quartiles, and each sample. The first subject is set against the
    second, where there are two."""
    rows: dict[str, object] = {}
    for line in lines:
        figures: dict[str, object] = {}
        looked_at = any(line.values(subject, STOLEN) for subject in subjects)
        for figure in (*line.figures, *([STOLEN] if looked_at else [])):
            one: dict[str, object] = {"unit": figure.unit}
            for subject in subjects:
                if values := line.values(subject, figure):
                    one[subject] = {**asdict(spread(values)), "samples": values}
            if len(subjects) == 2 and figure is not STOLEN:
                one["ratio"] = line.ratio(subjects[0], subjects[1], figure.key)
            figures[figure.key] = one
        rows[line.name] = {"title": line.title, "figures": figures, "failure": line.failure}
    return {**about, "rows": rows}


def write(document: Mapping[str, object], paths: Sequence[Path]) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
