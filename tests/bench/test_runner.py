"""Tests of the benchmarks' runner: the order of trials, the number of rounds, rows that fail, and the goals of the
bench `growth`.

A *row* is one line of the table of results, such as the pulls of a manifest by its tag. A *subject* is what is
measured, usually a server. A *trial* measures one row with one subject once. A *round* makes one trial of each row with
each subject.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from bench.errors import TrialFailed
from bench.growth.growth_rows import START_ROW, growth_rows
from bench.growth.page_rows import page_rows
from bench.loaders.connections import Connections
from bench.report.goals import growth_goals
from bench.report.measurements import RATE, RowSamples, Sample
from bench.runner import Rounds, Row


@dataclass(frozen=True)
class Subject:
    """A subject that only has a name, instead of a server."""

    name: str
    is_entrepot: bool


OURS, PEER = Subject("Entrepot", True), Subject("docker-registry", False)
Trial = tuple[str, int]
"""The name of the subject and the number of the round."""


def run(rounds: int, *rows: Row[Trial]) -> list[RowSamples]:
    """Measures the rows with `OURS` and `PEER`, and returns the samples of each row."""

    def open_trial(subject: Subject, number: int) -> contextlib.AbstractContextManager[Trial]:
        return contextlib.nullcontext((subject.name, number))

    runner = Rounds(rows, [OURS, PEER], open_trial)
    runner.prepare()
    return runner.run(rounds)


def recorder(trials: list[Trial]) -> Callable[[Trial], Sample]:
    """Returns a function for `Row.trial` that adds each trial to the list."""

    def trial(current: Trial) -> Sample:
        trials.append(current)
        return {RATE.key: 1.0}

    return trial


def test_order_of_subjects_alternates() -> None:
    """The order of the subjects is reversed in every second round. So if the machine becomes slower during a round,
    this does not always affect the same subject."""
    trials = list[Trial]()
    run(2, Row("row", "a row", (RATE,), recorder(trials)))
    assert trials == [(OURS.name, 0), (PEER.name, 0), (PEER.name, 1), (OURS.name, 1)]


def test_rounds_of_a_row_are_bounded() -> None:
    """`rounds` limits the rounds of both subjects, `peer_rounds` only those of docker-registry. With 0 rounds, the row
    is not prepared for the subject either."""
    bounded, unequal, prepared = list[Trial](), list[Trial](), list[Trial]()
    first = Row("a", "", (RATE,), recorder(bounded), rounds=1)
    run(2, first, Row("b", "", (RATE,), recorder(unequal), recorder(prepared), peer_rounds=0))
    assert bounded == [(OURS.name, 0), (PEER.name, 0)]
    assert unequal == [(OURS.name, 0), (OURS.name, 1)]
    assert prepared == [(OURS.name, 0)]


def test_a_failed_row_does_not_stop_other_rows() -> None:
    """After a failure, a row is not measured any more. It keeps the reason and its earlier samples. Other rows go
    on."""
    trials = list[Trial]()

    def fail_at_peer(current: Trial) -> Sample:
        if current[0] == PEER.name:
            raise TrialFailed("a wrong status")
        return recorder(trials)(current)

    failed_row, complete_row = run(3, Row("a", "", (RATE,), fail_at_peer), Row("b", "", (RATE,), recorder([])))
    assert (failed_row.failure, trials) == ("docker-registry: a wrong status", [(OURS.name, 0)])
    assert (complete_row.failure, len(complete_row.values(OURS.name, RATE.key))) == ("", 3)


def test_growth_goals_name_rows_and_figures_that_are_measured() -> None:
    """Every goal of the bench `growth` names an existing row and figure. The names of the rows differ."""
    row_names = [row.name for row in (*growth_rows(), *page_rows())] + [START_ROW.name]
    assert len(set(row_names)) == len(row_names)
    measured = {(row.name, figure.key) for row in (*growth_rows(), *page_rows()) for figure in row.figures}
    measured |= {(START_ROW.name, figure.key) for figure in START_ROW.figures}
    goals = growth_goals(smallest="100", largest="1,000")  # the names of two stores: their numbers of manifests
    assert {(goal.row, goal.key) for goal in goals} <= measured


def test_a_response_in_pieces_is_one_response() -> None:
    """`Connections` returns a response that arrives in pieces once, when its body is complete. It raises TrialFailed
    when the server closes the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(listener.accept)
        with Connections(listener.getsockname()[1]) as opened:
            connection = opened.open()
            server = accepted.result()[0]
            opened.send(connection, b"GET / HTTP/1.1\r\n\r\n")
            assert server.recv(100).startswith(b"GET")
            server.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
            assert list(opened.responses(5)) == []
            server.sendall(b"cd")
            ((number, answer, _),) = opened.responses(5)
            assert (number, answer[-8:]) == (connection, b"\r\n\r\nabcd")
            server.close()
            with pytest.raises(TrialFailed, match="closed a connection"):
                list(opened.responses(5))
