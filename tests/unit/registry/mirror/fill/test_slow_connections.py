"""Which connections of a download are cut because they are slow. This is decided when every byte of the blob has been
requested. The missing bytes of a cut request are then fetched over a faster connection."""

from __future__ import annotations

from registry.mirror.fill.pieces import MIB, StragglerDetector

KIB = 1024


def time_of_cut(
    rates: dict[str, float], bytes_left: dict[str, int], ended: tuple[float, ...] = (), seconds: float = 30.0
) -> float:
    """Returns the time in seconds at which the connection "slow" is cut; `seconds` if no connection is cut. `rates`:
    the bytes per second of each connection; `bytes_left`: the bytes that each connection has to fetch; `ended`: the
    bytes per second of the pieces that ended before."""
    stragglers: StragglerDetector[str] = StragglerDetector()
    for rate in ended:
        stragglers.note_piece(0.0, int(rate), 1.0)
    now = 0.0
    while now < seconds:
        stragglers.observe(now, {key: int(rate * now) for key, rate in rates.items()})
        cut_connections = stragglers.find(
            now, {key: bytes_left[key] - int(rates[key] * now) for key in rates if key in bytes_left}
        )
        if cut_connections:
            assert cut_connections == ["slow"]
            return now
        now += 0.02
    return seconds


def test_a_connection_that_is_much_slower_than_the_others_is_cut() -> None:
    """A connection that is much slower than the others is cut within three seconds. The other connections may still be
    in use, or may have ended."""
    others = {f"other {number}": 8.0 * MIB for number in range(7)}
    assert time_of_cut({"slow": 20.0 * KIB, **others}, {"slow": 60 * MIB, **dict.fromkeys(others, 300 * MIB)}) < 3
    assert time_of_cut({"slow": 20.0 * KIB}, {"slow": 60 * MIB}, ended=(8.0 * MIB,) * 7) < 3


def test_a_connection_that_stalls_is_cut() -> None:
    """A connection that stalls after its first bytes is cut."""
    assert time_of_cut({"slow": 0.0}, {"slow": MIB}, ended=(MIB,)) < 3


def test_no_connection_is_cut_if_all_are_slow() -> None:
    """If all connections are slow, none is cut, because a new connection would not be faster."""
    rates = {f"{number}": 20.0 * KIB for number in range(8)}
    assert time_of_cut(rates, dict.fromkeys(rates, 60 * MIB), ended=(20.0 * KIB,) * 3) == 30
    assert time_of_cut({"slow": 20.0 * KIB}, {"slow": 60 * MIB}) == 30, "nothing to compare with"


def test_a_connection_that_is_nearly_done_is_not_cut() -> None:
    """A connection that has few bytes left to fetch is not cut, because these bytes are not worth another request."""
    assert time_of_cut({"slow": 100.0 * KIB}, {"slow": 300 * KIB}, ended=(8.0 * MIB,) * 7, seconds=2.5) == 2.5


def test_a_connection_that_is_half_as_fast_is_not_cut() -> None:
    """A connection with half the rate of the others is not cut, because such a difference may be chance."""
    assert time_of_cut({"slow": 4.0 * MIB}, {"slow": 500 * MIB}, ended=(8.0 * MIB,) * 7) == 30


def test_a_link_that_became_slow_costs_one_request() -> None:
    """After a connection was cut, rates from before the cut no longer count. If the whole link became slow, only one
    connection is cut."""
    stragglers: StragglerDetector[int] = StragglerDetector()
    stragglers.note_piece(0.0, 8 * MIB, 1.0)
    now, cuts, name, begun_at = 0.0, 0, 0, 0.0
    while now < 60:
        stragglers.observe(now, {name: int((now - begun_at) * 20 * KIB)})
        if stragglers.find(now, {name: 60 * MIB}):
            cuts, name, begun_at = cuts + 1, name + 1, now
        now += 0.02
    assert cuts == 1
