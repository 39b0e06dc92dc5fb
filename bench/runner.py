"""The runner that all benches share. It measures rows in rounds, prints tables, and writes results and plots."""

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
    """The thing that a bench measures: a server, a program, or a store."""

    @property
    def name(self) -> str: ...
    @property
    def is_entrepot(self) -> bool: ...


TrialT = TypeVar("TrialT")
"""The class with the data that one trial needs. Each bench has its own class."""
SubjectT = TypeVar("SubjectT", bound=Subject)
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Row(Generic[TrialT]):
    """A row of the table of results. A row may have several figures."""

    name: str
    """The name of the row for the option `--only`."""
    title: str
    figures: tuple[Figure, ...]
    trial: Callable[[TrialT], Sample]
    """Measures one subject in one round. Raises BenchFailed."""
    prepare: Callable[[TrialT], object] | None = None
    """Prepares one subject before the first round. Raises BenchFailed."""
    rounds: int | None = None
    """The largest number of rounds in which the row is measured; None: all rounds."""
    peer_rounds: int | None = None
    """The largest number of rounds in which the row is measured with docker-registry; 0: docker-registry cannot do what
    the row measures."""

    def takes_part(self, subject: Subject, number: int) -> bool:
        """Returns whether the row measures the subject in round `number`."""
        bounds = [self.rounds] if subject.is_entrepot else [self.rounds, self.peer_rounds]
        return all(bound is None or number < bound for bound in bounds)


def pick_rows(rows: Sequence[Row[TrialT]], only: str | None) -> list[Row[TrialT]]:
    """Returns the rows in a comma-separated list of names, or all rows. Raises BenchFailed for an unknown name."""
    row_names = [row.name for row in rows]
    wanted = [name.strip() for name in only.split(",")] if only else row_names
    if unknown := [name for name in wanted if name not in row_names]:
        raise BenchFailed(f"no row is called {', '.join(unknown)}; there are: {', '.join(row_names)}")
    return [row for row in rows if row.name in wanted]


class Rounds(Generic[TrialT, SubjectT]):
    """Measures rows in rounds. In each round, each row is measured once with each subject. Every second round takes the
    subjects in reverse order."""

    def __init__(
        self,
        rows: Sequence[Row[TrialT]],
        subjects: Sequence[SubjectT],
        open_trial: Callable[[SubjectT, int], AbstractContextManager[TrialT]],
    ) -> None:
        """`open_trial`: returns a context manager that prepares the trial of a subject in a round, and cleans up after
        the trial."""
        self._rows, self._subjects, self._open_trial = rows, subjects, open_trial
        self.measured_rows = [RowSamples(row.name, row.title, row.figures) for row in rows]

    def prepare(self) -> None:
        """Prepares all rows for all subjects."""
        for row, row_samples in zip(self._rows, self.measured_rows, strict=True):
            if row.prepare is not None:
                for subject in self._subjects:
                    self._attempt(row_samples, row, row.prepare, subject, 0)

    def run(self, rounds: int) -> list[RowSamples]:
        """Runs `rounds` rounds and returns the samples."""
        for number in range(rounds):
            for row, row_samples in zip(self._rows, self.measured_rows, strict=True):
                for subject in self._subjects if number % 2 == 0 else self._subjects[::-1]:
                    os.sync()  # the next trial must not be slowed down by data that is still to be written to the disk
                    steal = start_steal_meter()
                    sample = self._attempt(row_samples, row, row.trial, subject, number)
                    if sample is not None:
                        row_samples.samples.setdefault(subject.name, []).append({**sample, STEAL.key: steal()})
            print(f"round {number + 1} of {rounds} done", flush=True)
        return self.measured_rows

    def _attempt(
        self,
        row_samples: RowSamples,
        row: Row[TrialT],
        step: Callable[[TrialT], ResultT],
        subject: SubjectT,
        number: int,
    ) -> ResultT | None:
        """Runs a step of a row and returns its result. If the step fails, the row is no longer measured. Returns None
        if the step fails or has failed before, or if the row is not measured with the subject in this round."""
        if row_samples.failure or not row.takes_part(subject, number):
            return None
        try:
            with self._open_trial(subject, number) as trial:
                return step(trial)
        except BenchFailed as error:
            row_samples.failure = f"{subject.name}: {error}"
            print(f"FAILED {row_samples.name}: {row_samples.failure}", flush=True)
            return None


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    rounds: int
    seconds: float
    """The length of a trial in seconds. Some trials end by themselves and ignore it."""
    quick: bool
    strict: bool
    against: Path | None
    """The checkout of another Entrepot version to compare with, instead of docker-registry."""
    only: str | None
    sizes: Sequence[int]
    """The sizes of the stores: the number of manifests for the bench `growth`, the number of blobs for `upkeep`."""
    folder: Path | None
    json: Path | None
    plot: Path | None


@dataclass(frozen=True)
class Findings:
    """The results of a bench."""

    measured_rows: Sequence[RowSamples]
    subjects: Sequence[str]
    goals: Sequence[Goal]
    plot: str
    """The plot as SVG."""
    about: Mapping[str, object] = field(default_factory=dict)
    """Facts about the run for the file of results."""
    table: Callable[[Sequence[RowSamples], Sequence[str]], str] = figures_table


@dataclass(frozen=True)
class Bench:
    """A bench that is ready to run."""

    name: str
    """The name of the bench's files in the folder of results."""
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
    """Returns a bench that compares Entrepot with docker-registry or, with the option `--against`, with an older
    Entrepot. `names`: the name of the files of results for docker-registry, and the one for an older Entrepot. `goals`:
    the goals for docker-registry; against an older Entrepot, the goal is that no row costs more. `drawn`: the figures
    of the plot. Raises BenchFailed if the folder of `--against` is not a checkout of Entrepot."""
    peer = entrepot_checkout(options.against) if options.against else DOCKER_REGISTRY
    programs = (ENTREPOT, peer)

    def find(folder: Path) -> Findings:
        measured_rows = measure(programs, folder)
        wanted = no_slower_goals(measured_rows, peer.name) if options.against else goals
        subjects = [program.name for program in programs]
        return Findings(measured_rows, subjects, wanted, ratio_bars(measured_rows, *subjects, drawn=drawn))

    required = dict(packages) if options.against else {**packages, **DOCKER_REGISTRY_PACKAGES}
    return Bench(names[1 if options.against else 0], programs, required, disk_bytes, find)


def run_bench(bench: Bench, options: Options) -> bool:
    """Runs the bench, prints the results, and writes the files of results. Returns whether all trials succeeded and,
    with `--strict`, all goals are met. Raises BenchFailed."""
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
    """Writes the results to files and prints them. Returns whether all rows were measured and, with `--strict`, all
    goals are met."""
    results = judge_goals({row_samples.name: row_samples for row_samples in found.measured_rows}, found.goals)
    document = {**results_document(found.measured_rows, found.subjects, about), "goals": goals_document(results)}
    write_json(document, _targets(f"{name}.json", options.json))
    for path in _targets(f"{name}.svg", options.plot):
        path.write_text(found.plot)
    print(f"\n{found.table(found.measured_rows, found.subjects)}\n\n{goals_table(results)}")
    if note := steal_note(found.measured_rows, found.subjects):
        print(f"\n{note}")
    failed = [row_samples for row_samples in found.measured_rows if row_samples.failure]
    for row_samples in failed:
        print(f"\nFAILED {row_samples.name}: {row_samples.failure}")
    return not failed and (are_all_met(results) or not options.strict)


def _targets(name: str, other: Path | None) -> list[Path]:
    return [RESULTS_FOLDER / name, *([other] if other else [])]
