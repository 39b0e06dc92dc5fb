"""Tests of the rounds: their order, the rows that stop, and the rows of the growth bench."""

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
    """A subject that is not started."""

    name: str
    is_entrepot: bool


OURS, PEER = Subject("Entrepot", True), Subject("docker-registry", False)
Trial = tuple[str, int]
"""The name of the subject and the number of the round."""


def run(rounds: int, *rows: Row[Trial]) -> list[RowSamples]:
    def open_trial(subject: Subject, number: int) -> contextlib.AbstractContextManager[Trial]:
        return contextlib.nullcontext((subject.name, number))

    runner = Rounds(rows, [OURS, PEER], open_trial)
    runner.prepare()
    return runner.run(rounds)


def recorder(seen: list[Trial]) -> Callable[[Trial], Sample]:
    def trial(this: Trial) -> Sample:
        seen.append(this)
        return {RATE.key: 1.0}

    return trial


def test_order_of_servers_alternates() -> None:
    """The order alternates, so a machine that becomes slower during a round does not slow down one server more than the
    other."""
    seen = list[Trial]()
    run(2, Row("row", "a row", (RATE,), recorder(seen)))
    assert seen == [(OURS.name, 0), (PEER.name, 0), (PEER.name, 1), (OURS.name, 1)]


def test_rounds_of_a_row_are_bounded() -> None:
    """`rounds` bounds both servers, `peer_rounds` only docker-registry, whose row is not prepared either at 0."""
    bounded, unequal, prepared = list[Trial](), list[Trial](), list[Trial]()
    first = Row("a", "", (RATE,), recorder(bounded), rounds=1)
    run(2, first, Row("b", "", (RATE,), recorder(unequal), recorder(prepared), peer_rounds=0))
    assert bounded == [(OURS.name, 0), (PEER.name, 0)]
    assert unequal == [(OURS.name, 0), (OURS.name, 1)]
    assert prepared == [(OURS.name, 0)]


def test_a_failed_row_stops_alone() -> None:
    """A failure ends its row, with its reason, and no other row. The samples from before it stay."""
    seen = list[Trial]()

    def fail_at_peer(this: Trial) -> Sample:
        if this[0] == PEER.name:
            raise TrialFailed("a wrong status")
        return recorder(seen)(this)

    failed, whole = run(3, Row("a", "", (RATE,), fail_at_peer), Row("b", "", (RATE,), recorder([])))
    assert (failed.failure, seen) == ("docker-registry: a wrong status", [(OURS.name, 0)])
    assert (whole.failure, len(whole.values(OURS.name, RATE.key))) == ("", 3)


def test_growth_goals_name_rows_and_figures_that_are_measured() -> None:
    """Every goal of the growth bench has its row, and the names of the rows differ."""
    rows = [(row.name, figure.key) for row in (*growth_rows(), *page_rows()) for figure in row.figures]
    rows += [(START_ROW.name, figure.key) for figure in START_ROW.figures]
    assert {(goal.row, goal.key) for goal in growth_goals("100", "1,000")} <= set(rows)
    assert len(set(rows)) == len(rows)


def test_a_response_in_pieces_is_one_response() -> None:
    """A loader counts a response once, when its body is complete, and fails when the server closes the connection."""
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
