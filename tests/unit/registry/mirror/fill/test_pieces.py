"""How a blob is split into requests, and over how many connections they run."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from registry.mirror.fill.pieces import (
    LARGEST_PIECE,
    MIB,
    RATE_WINDOW_SECONDS,
    SMALLEST_PIECE,
    AdaptiveConcurrency,
    PiecePlan,
)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), max_size=5),
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3), st.lists(st.integers(0, 5000), max_size=3)), max_size=60),
)
def test_every_byte_is_asked_for_once(gaps: list[tuple[int, int]], takes: list[tuple[int, int, list[int]]]) -> None:
    """In whatever order pieces are taken and given back, no byte is assigned twice at the same time. In the end, every
    byte was assigned."""
    at, holes = 0, []
    for space, length in gaps:
        holes.append(((at + space) * MIB, (at + space + length) * MIB))
        at += space + length + 1
    plan, got = PiecePlan(holes), set[tuple[int, int]]()
    for length, share, wanted in takes:
        before = plan.remaining
        piece = plan.take(length * MIB, [offset * MIB for offset in wanted])
        if piece is None:
            assert before == 0
            break
        assert plan.remaining == before - (piece.stop - piece.start)
        piece.next_offset = piece.start + (piece.stop - piece.start) * share // 3
        got.add((piece.start, piece.next_offset))
        plan.give_back(piece)
    while (piece := plan.take(LARGEST_PIECE)) is not None:
        got.add((piece.start, piece.stop))
    covered = sorted(span for span in got if span[0] < span[1])
    merged: list[list[int]] = []
    for start, stop in covered:
        if merged and merged[-1][1] == start:
            merged[-1][1] = stop
        else:
            assert not merged or merged[-1][1] < start
            merged.append([start, stop])
    assert [tuple(span) for span in merged] == holes


def test_the_byte_that_a_reader_waits_for_comes_first() -> None:
    """A piece starts at the byte for which a reader waits, if that byte is free. Otherwise it starts at the first
    missing byte."""
    plan = PiecePlan([(0, 100 * MIB)])
    first = plan.take(2 * MIB, [0])
    ahead = plan.take(2 * MIB, [0, 50 * MIB])
    assert first is not None
    assert ahead is not None
    assert (first.start, ahead.start) == (0, 50 * MIB)
    following = plan.take(2 * MIB, [51 * MIB])
    assert following is not None
    assert following.start == 2 * MIB


def run(rate: Callable[[int], float], seconds: float, most: int = 8) -> list[int]:
    """Returns the connections at each moment, on a link where n connections deliver `rate(n)` bytes per second."""
    now, received = 0.0, 0.0
    pace = AdaptiveConcurrency(most, now)
    widths = []
    while now < seconds:
        now += 0.025
        received += rate(pace.connections) * 0.025
        pace.observe(now, int(received), pace.connections, is_waiting=False)
        widths.append(pace.connections)
    return widths


def test_more_connections_where_they_help() -> None:
    """On a link that limits the rate of each connection, all connections are in use within half a second."""
    widths = run(lambda width: width * 8 * MIB, 10)
    assert widths[int(0.6 / 0.025)] == 8
    assert widths[-1] == 8


def test_few_connections_where_they_do_not_help() -> None:
    """On a link that one connection saturates, further connections are tried now and then and given up again."""
    widths = run(lambda width: 40 * MIB, 20)
    assert sum(widths) / len(widths) < 1.2
    assert max(widths) == 2


def test_one_connection_where_it_is_fast() -> None:
    """No second connection is tried if one delivers more than 64 MiB per second."""
    assert set(run(lambda width: 100 * MIB, 5)) == {1}


def test_nothing_is_concluded_while_other_fills_hold_the_connections() -> None:
    """If other fills hold all further connections, nothing is concluded from the missing speedup: another connection is
    tried again soon."""
    now, received, pace = 0.0, 0, AdaptiveConcurrency(8, 0.0)
    while now < 3:
        now += 0.025
        running = 1 if now < 1 else pace.connections
        received += int(running * 8 * MIB * 0.025)
        pace.observe(now, received, running, is_waiting=False)
    assert pace.connections == 8


def test_a_link_that_slows_down_is_tried_anew() -> None:
    """When the rate falls, more connections are tried at once."""
    now, received, pace = 0.0, 0, AdaptiveConcurrency(8, 0.0)
    for step in range(200):
        now += 0.025
        rate = 100 * MIB if step < 40 else pace.connections * MIB
        received += int(rate * 0.025)
        pace.observe(now, received, pace.connections, is_waiting=False)
    assert pace.connections == 8


def test_new_connections_get_time_to_begin() -> None:
    """Connections with late first bytes are not given up before these arrive."""
    pace, now, received = AdaptiveConcurrency(8, 0.0), 0.0, 0
    begun, grown, width = 0, 0.0, 1
    for _ in range(200):
        now += 0.025
        if pace.connections != width:
            grown, width = now, pace.connections
        if now - grown > 0.4:
            begun = width
        received += int(begun * 8 * MIB * 0.025)
        pace.observe(now, received, width, is_waiting=begun < width)
    assert pace.connections == 8


def test_pieces_fit_the_rate() -> None:
    """A piece takes about 0.75 s. Near the end pieces get small, so that all connections end together."""
    pace = AdaptiveConcurrency(8, 0.0)
    for _ in range(10):
        pace.note_piece(pace.length, pace.length / (8 * MIB), 0.02)
    assert pace.length == 6 * MIB
    pace.connections = 8
    assert pace.next_length(200 * MIB) == 6 * MIB
    assert pace.next_length(32 * MIB) == 2 * MIB
    assert pace.next_length(3 * MIB) == 6 * MIB // 4
    pace.length = 2 * MIB
    assert pace.next_length(3 * MIB) == SMALLEST_PIECE
    for _ in range(20):
        pace.note_piece(pace.length, pace.length / (4000 * MIB), 0.001)
    assert pace.length == LARGEST_PIECE


def test_a_denied_connection_is_asked_for_again_later() -> None:
    """While other fills hold the connections, no more are requested until a moment later."""
    pace = AdaptiveConcurrency(8, 0.0)
    pace.observe(RATE_WINDOW_SECONDS, MIB, 1, is_waiting=False)
    assert pace.connections == 2
    pace.note_unavailable(RATE_WINDOW_SECONDS, 1)
    assert pace.connections == 1
    pace.observe(2 * RATE_WINDOW_SECONDS, 2 * MIB, 1, is_waiting=False)
    assert pace.connections == 1
    pace.observe(4 * RATE_WINDOW_SECONDS, 4 * MIB, 1, is_waiting=False)
    assert pace.connections == 2
