"""The runner that all benches share: measures rows in rounds, prints tables, and writes results and plots."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from bench.errors import BenchFailed
from bench.report.goals import Goal, are_all_met, goals_document, judge_goals, no_slower_goals
from bench.report.measurements import RATE, SPEED, STEAL, Figure, RowSamples, Sample, results_document, write_json
from bench.report.plot import ratio_bars
from bench.report.tables import figures_table, goals_table, steal_note
from bench.system.machine import (
    DOCKER_REGISTRY_PACKAGES,
    check_space,
    describe_machine,
    package_version,
    require_packages,
    start_steal_meter,
)
from bench.system.servers import DOCKER_REGISTRY, ENTREPOT, ServerProgram, entrepot_checkout

RESULTS_FOLDER = Path(__file__).resolve().parent / "results"


class Subject(Protocol):
    """What is measured: a server, a program, or a store."""

    @property
    def name(self) -> str: ...
    @property
    def is_entrepot(self) -> bool: ...


TrialT = TypeVar("TrialT")
"""All that one trial needs: each bench has its own class for it."""
SubjectT = TypeVar("SubjectT", bound=Subject)
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Row(Generic[TrialT]):
    """A row of the table, which may have several figures."""

    name: str
    """The name for `--only`."""
    title: str
    figures: tuple[Figure, ...]
    trial: Callable[[TrialT], Sample]
    """Measures one subject in one round. Raises BenchFailed."""
    prepare: Callable[[TrialT], object] | None = None
    """Prepares one subject before the first round. Raises BenchFailed."""
    rounds: int | None = None
    """The most rounds that this row takes part in; None: all."""
    peer_rounds: int | None = None
    """The most rounds for docker-registry; 0: it cannot do what the row measures."""

    def takes_part(self, subject: Subject, number: int) -> bool:
        """Returns whether the row measures the subject in round `number`."""
        bounds = [self.rounds] if subject.is_entrepot else [self.rounds, self.peer_rounds]
        return all(bound is None or number < bound for bound in bounds)


def pick_rows(rows: Sequence[Row[TrialT]], only: str | None) -> list[Row[TrialT]]:
    """Returns the rows in a comma-separated list of names, or all rows. Raises BenchFailed for an unknown name."""
    known = [row.name for row in rows]
    wanted = [name.strip() for name in only.split(",")] if only else known
    if unknown := [name for name in wanted if name not in known]:
        raise BenchFailed(f"no row is called {', '.join(unknown)}; there are: {', '.join(known)}")
    return [row for row in rows if row.name in wanted]


class Rounds(Generic[TrialT, SubjectT]):
    """Measures rows: each round makes one trial of each row with each subject, in alternating order."""

    def __init__(
        self,
        rows: Sequence[Row[TrialT]],
        subjects: Sequence[SubjectT],
        open_trial: Callable[[SubjectT, int], AbstractContextManager[TrialT]],
    ) -> None:
        """`open_trial`: makes the trial of a subject in a round, and cleans up after it."""
        self._rows, self._subjects, self._open_trial = rows, subjects, open_trial
        self.lines = [RowSamples(row.name, row.title, row.figures) for row in rows]

    def prepare(self) -> None:
        """Prepares all rows for all subjects."""
        for row, line in zip(self._rows, self.lines, strict=True):
            if row.prepare is not None:
                for subject in self._subjects:
                    self._attempt(line, row, row.prepare, subject, 0)

    def run(self, rounds: int) -> list[RowSamples]:
        """Runs so many rounds and returns the samples."""
        for number in range(rounds):
            for row, line in zip(self._rows, self.lines, strict=True):
                for subject in self._subjects if number % 2 == 0 else self._subjects[::-1]:
                    os.sync()  # data that one trial leaves unwritten must not slow down the next
                    steal = start_steal_meter()
                    sample = self._attempt(line, row, row.trial, subject, number)
                    if sample is not None:
                        line.samples.setdefault(subject.name, []).append({**sample, STEAL.key: steal()})
            print(f"round {number + 1} of {rounds} done", flush=True)
        return self.lines

    def _attempt(
        self, line: RowSamples, row: Row[TrialT], step: Callable[[TrialT], ResultT], subject: SubjectT, number: int
    ) -> ResultT | None:
        """Runs a step of a row. After a failure, the row is not measured any more. Returns None if the step failed or
        the subject does not take part."""
        if line.failure or not row.takes_part(subject, number):
            return None
        try:
            with self._open_trial(subject, number) as trial:
                return step(trial)
        except BenchFailed as error:
            line.failure = f"{subject.name}: {error}"
            print(f"FAILED {line.name}: {line.failure}", flush=True)
            return None


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    rounds: int
    seconds: float
    """The length of a trial, where it does not end by itself."""
    quick: bool
    strict: bool
    against: Path | None
    """The checkout to compare with, in place of docker-registry."""
    only: str | None
    sizes: Sequence[int]
    """Manifests in each store of the growth bench, or blobs in each of the upkeep bench."""
    folder: Path | None
    json: Path | None
    plot: Path | None


@dataclass(frozen=True)
class Findings:
    """What a bench has measured."""

    lines: Sequence[RowSamples]
    subjects: Sequence[str]
    goals: Sequence[Goal]
    plot: str
    """An SVG."""
    about: Mapping[str, object] = field(default_factory=dict)
    """Facts for the results file."""
    table: Callable[[Sequence[RowSamples], Sequence[str]], str] = figures_table


@dataclass(frozen=True)
class Bench:
    """A bench, ready to run."""

    name: str
    """Of its files in the folder of results."""
    programs: Sequence[ServerProgram]
    packages: Mapping[str, str]
    disk_bytes: int
    measure: Callable[[Path], Findings]
    """Measures all rows in a temporary folder. Raises BenchFailed."""


def comparison(
    options: Options,
    names: tuple[str, str],
    packages: Mapping[str, str],
    disk_bytes: int,
    goals: Sequence[Goal],
    measure: Callable[[Sequence[ServerProgram], Path], list[RowSamples]],
    drawn: Collection[Figure] = (RATE, SPEED),
) -> Bench:
    """Returns a bench that compares Entrepot with docker-registry or, with `--against`, with an older Entrepot, for
    which no row may cost more. `names`: of the results for the one and the other. `goals`: beside docker-registry.
    `drawn`: the figures of the plot. Raises BenchFailed for a folder that is not a checkout."""
    peer = entrepot_checkout(options.against) if options.against else DOCKER_REGISTRY
    programs = (ENTREPOT, peer)

    def find(folder: Path) -> Findings:
        lines = measure(programs, folder)
        wanted = no_slower_goals(lines, peer.name) if options.against else goals
        subjects = [program.name for program in programs]
        return Findings(lines, subjects, wanted, ratio_bars(lines, *subjects, drawn=drawn))

    required = dict(packages) if options.against else {**packages, **DOCKER_REGISTRY_PACKAGES}
    return Bench(names[1 if options.against else 0], programs, required, disk_bytes, find)


def run_bench(bench: Bench, options: Options) -> bool:
    """Measures, prints and writes everything. Returns whether all trials gave figures and, with `--strict`, all goals
    are met. Raises BenchFailed."""
    require_packages(bench.packages)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=options.folder))
    try:
        check_space(folder, bench.disk_bytes)
        versions = {program.name: program.version() for program in bench.programs}
        about = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": describe_machine(folder),
            "versions": versions | {name: package_version(name) for name in sorted(set(bench.packages.values()))},
            "rounds": options.rounds,
            "seconds": options.seconds,
            "quick": options.quick,
        }
        found = bench.measure(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _publish(bench.name, {**about, **found.about}, found, options)


def _publish(name: str, about: Mapping[str, object], found: Findings, options: Options) -> bool:
    results = judge_goals({line.name: line for line in found.lines}, found.goals)
    document = {**results_document(found.lines, found.subjects, about), "goals": goals_document(results)}
    write_json(document, _targets(f"{name}.json", options.json))
    for path in _targets(f"{name}.svg", options.plot):
        path.write_text(found.plot)
    print(f"\n{found.table(found.lines, found.subjects)}\n\n{goals_table(results)}")
    if note := steal_note(found.lines, found.subjects):
        print(f"\n{note}")
    failed = [line for line in found.lines if line.failure]
    for line in failed:
        print(f"\nFAILED {line.name}: {line.failure}")
    return not failed and (are_all_met(results) or not options.strict)


def _targets(name: str, other: Path | None) -> list[Path]:
    return [RESULTS_FOLDER / name, *([other] if other else [])]
