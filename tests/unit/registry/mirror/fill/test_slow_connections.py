"""Which connections are cut once every byte was requested."""

from __future__ import annotations

from registry.mirror.fill.pieces import MIB, StragglerDetector

KIB = 1024


def cut(rates: dict[str, float], left: dict[str, int], ended: tuple[float, ...] = (), seconds: float = 30.0) -> float:
    """Returns when the first connection is cut, if connections run at these rates. `ended`: the rates of the pieces
    that have ended before."""
    stragglers: StragglerDetector[str] = StragglerDetector()
    for rate in ended:
        stragglers.note_piece(0.0, int(rate), 1.0)
    now = 0.0
    while now < seconds:
        stragglers.observe(now, {key: int(rate * now) for key, rate in rates.items()})
        found = stragglers.find(now, {key: left[key] - int(rates[key] * now) for key in rates if key in left})
        if found:
            assert found == ["slow"]
            return now
        now += 0.02
    return seconds


def test_a_connection_that_is_much_slower_than_the_others_is_cut() -> None:
    """A connection that is much slower than the others is cut within some seconds, whether the others still run or have
    ended."""
    others = {f"other {number}": 8.0 * MIB for number in range(7)}
    assert cut({"slow": 20.0 * KIB, **others}, {"slow": 60 * MIB, **dict.fromkeys(others, 300 * MIB)}) < 3
    assert cut({"slow": 20.0 * KIB}, {"slow": 60 * MIB}, ended=(8.0 * MIB,) * 7) < 3


def test_a_connection_that_stalls_is_cut() -> None:
    """A connection that stalls after its first bytes is cut."""
    assert cut({"slow": 0.0}, {"slow": MIB}, ended=(MIB,)) < 3


def test_no_connection_is_cut_if_all_are_slow() -> None:
    """If all connections are slow, none is cut: others would not be faster."""
    rates = {f"{number}": 20.0 * KIB for number in range(8)}
    assert cut(rates, dict.fromkeys(rates, 60 * MIB), ended=(20.0 * KIB,) * 3) == 30
    assert cut({"slow": 20.0 * KIB}, {"slow": 60 * MIB}) == 30, "nothing to compare with"


def test_a_connection_that_is_nearly_done_is_not_cut() -> None:
    """A connection with little left is not cut: the rest is not worth another request."""
    assert cut({"slow": 100.0 * KIB}, {"slow": 300 * KIB}, ended=(8.0 * MIB,) * 7, seconds=2.5) == 2.5


def test_a_connection_that_is_half_as_fast_is_not_cut() -> None:
    """A connection at half the rate of the others is not cut, because that may be chance."""
    assert cut({"slow": 4.0 * MIB}, {"slow": 500 * MIB}, ended=(8.0 * MIB,) * 7) == 30


def test_a_link_that_became_slow_costs_one_request() -> None:
    """After a cut, earlier rates are forgotten, and connections are compared only by the rates since then."""
    stragglers: StragglerDetector[int] = StragglerDetector()
    stragglers.note_piece(0.0, 8 * MIB, 1.0)
    now, cuts, name, begun = 0.0, 0, 0, 0.0
    while now < 60:
        stragglers.observe(now, {name: int((now - begun) * 20 * KIB)})
        if stragglers.find(now, {name: 60 * MIB}):
            cuts, name, begun = cuts + 1, name + 1, now
        now += 0.02
    assert cuts == 1
