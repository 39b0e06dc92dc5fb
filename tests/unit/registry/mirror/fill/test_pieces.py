"""How the download of a blob is split into pieces, and how many connections are used for it. Each piece is one range
request to the upstream."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from registry.mirror.fill.pieces import (
    LARGEST_PIECE_BYTES,
    MIB,
    RATE_WINDOW_SECONDS,
    SMALLEST_PIECE_BYTES,
    AdaptiveConcurrency,
    PiecePlan,
)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), max_size=5),
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3), st.lists(st.integers(0, 5000), max_size=3)), max_size=60),
)
def test_every_byte_is_assigned_once(gaps: list[tuple[int, int]], takes: list[tuple[int, int, list[int]]]) -> None:
    """Pieces are taken from the plan, partly downloaded, and given back, in any order. No byte belongs to two pieces at
    the same time. In the end, every missing byte was assigned to a piece. `gaps`: the stored and missing MiB in turn;
    `takes`: the length of a piece in MiB, how many thirds are downloaded, and the offsets that readers wait for."""
    at, missing_spans = 0, []
    for space, length in gaps:
        missing_spans.append(((at + space) * MIB, (at + space + length) * MIB))
        at += space + length + 1
    plan, downloaded = PiecePlan(missing_spans), set[tuple[int, int]]()
    for length, share, wanted in takes:
        remaining_before = plan.remaining
        piece = plan.take(length * MIB, [offset * MIB for offset in sorted(wanted)])
        if piece is None:
            assert remaining_before == 0
            break
        assert plan.remaining == remaining_before - (piece.stop - piece.start)
        piece.next_offset = piece.start + (piece.stop - piece.start) * share // 3
        downloaded.add((piece.start, piece.next_offset))
        plan.give_back(piece)
    while (piece := plan.take(LARGEST_PIECE_BYTES)) is not None:
        downloaded.add((piece.start, piece.stop))
    covered = sorted(span for span in downloaded if span[0] < span[1])
    merged: list[list[int]] = []
    for start, stop in covered:
        if merged and merged[-1][1] == start:
            merged[-1][1] = stop
        else:
            assert not merged or merged[-1][1] < start
            merged.append([start, stop])
    assert [tuple(span) for span in merged] == missing_spans


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


def simulate(rate: Callable[[int], float], seconds: float, most: int = 8) -> list[int]:
    """Returns the number of connections every 25 ms, on a link where n connections deliver `rate(n)` bytes per
    second."""
    now, received = 0.0, 0.0
    concurrency = AdaptiveConcurrency(most, now)
    connection_counts = []
    while now < seconds:
        now += 0.025
        received += rate(concurrency.connections) * 0.025
        concurrency.observe(now, int(received), concurrency.connections, awaits_first_byte=False)
        connection_counts.append(concurrency.connections)
    return connection_counts


def test_more_connections_where_they_help() -> None:
    """On a link that limits the rate of each connection, all connections are in use within 0.6 s."""
    connection_counts = simulate(lambda connections: connections * 8 * MIB, 10)
    assert connection_counts[int(0.6 / 0.025)] == 8
    assert connection_counts[-1] == 8


def test_few_connections_where_they_do_not_help() -> None:
    """On a link that one connection saturates, a second connection is tried now and then, and closed again."""
    connection_counts = simulate(lambda connections: 40 * MIB, 20)
    assert sum(connection_counts) / len(connection_counts) < 1.2
    assert max(connection_counts) == 2


def test_a_fast_connection_is_the_only_one() -> None:
    """If the first connection delivers more than 64 MiB per second, no second one is tried."""
    assert set(simulate(lambda connections: 100 * MIB, 5)) == {1}


def test_speedup_is_not_judged_while_other_fills_hold_the_connections() -> None:
    """If other fills hold all further connections, the download cannot become faster. This does not count as a proof
    that more connections do not help: another connection is tried again soon."""
    now, received, concurrency = 0.0, 0, AdaptiveConcurrency(8, 0.0)
    while now < 3:
        now += 0.025
        running = 1 if now < 1 else concurrency.connections  # other fills hold the connections for one second
        received += int(running * 8 * MIB * 0.025)
        concurrency.observe(now, received, running, awaits_first_byte=False)
    assert concurrency.connections == 8


def test_more_connections_are_tried_when_the_rate_falls() -> None:
    """When the rate falls, more connections are tried at once."""
    now, received, concurrency = 0.0, 0, AdaptiveConcurrency(8, 0.0)
    for step in range(200):
        now += 0.025
        rate = 100 * MIB if step < 40 else concurrency.connections * MIB
        received += int(rate * 0.025)
        concurrency.observe(now, received, concurrency.connections, awaits_first_byte=False)
    assert concurrency.connections == 8


def test_new_connections_get_time_for_their_first_bytes() -> None:
    """If the first bytes of new connections are late, the connections are not given up before these bytes arrive."""
    concurrency, now, received = AdaptiveConcurrency(8, 0.0), 0.0, 0
    delivering, grown_at, connections = 0, 0.0, 1
    for _ in range(200):
        now += 0.025
        if concurrency.connections != connections:
            grown_at, connections = now, concurrency.connections
        if now - grown_at > 0.4:
            delivering = connections
        received += int(delivering * 8 * MIB * 0.025)
        concurrency.observe(now, received, connections, awaits_first_byte=delivering < connections)
    assert concurrency.connections == 8


def test_pieces_fit_the_rate() -> None:
    """The length of a piece is chosen so that its download takes about 0.75 s. Near the end of a blob the pieces get
    shorter, so that all connections finish at the same time."""
    concurrency = AdaptiveConcurrency(8, 0.0)
    for _ in range(10):
        concurrency.note_piece(concurrency.piece_length, concurrency.piece_length / (8 * MIB), 0.02)
    assert concurrency.piece_length == 6 * MIB
    concurrency.connections = 8
    assert concurrency.next_piece_length(200 * MIB) == 6 * MIB
    assert concurrency.next_piece_length(32 * MIB) == 2 * MIB
    assert concurrency.next_piece_length(3 * MIB) == 6 * MIB // 4
    concurrency.piece_length = 2 * MIB
    assert concurrency.next_piece_length(3 * MIB) == SMALLEST_PIECE_BYTES
    for _ in range(20):
        concurrency.note_piece(concurrency.piece_length, concurrency.piece_length / (4000 * MIB), 0.001)
    assert concurrency.piece_length == LARGEST_PIECE_BYTES


def test_an_unavailable_connection_is_requested_again_later() -> None:
    """If no connection was free because other fills hold them, the next one is requested only after a pause."""
    concurrency = AdaptiveConcurrency(8, 0.0)
    concurrency.observe(RATE_WINDOW_SECONDS, MIB, 1, awaits_first_byte=False)
    assert concurrency.connections == 2
    concurrency.reduce_connections(RATE_WINDOW_SECONDS, 1)
    assert concurrency.connections == 1
    concurrency.observe(2 * RATE_WINDOW_SECONDS, 2 * MIB, 1, awaits_first_byte=False)
    assert concurrency.connections == 1
    concurrency.observe(4 * RATE_WINDOW_SECONDS, 4 * MIB, 1, awaits_first_byte=False)
    assert concurrency.connections == 2
