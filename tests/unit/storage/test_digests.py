"""Digests whose state is saved and restored."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

import pytest

from storage.errors import DigestInvalid
from storage.names import ALGORITHMS
from storage.running_digest import Data, HashlibDigest, restore_digest, start_digest

BODY = random.Random(1).randbytes(100_003)


def _cuts(seed: int, most: int = 12) -> list[int]:
    mood = random.Random(seed)
    near = [mood.choice((64, 128)) * mood.randrange(700) + mood.randint(-1, 1) for _ in range(mood.randrange(most))]
    return [0, *sorted(min(max(cut, 0), len(BODY)) for cut in near), len(BODY)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("seed", range(40))
def test_a_digest_saved_and_restored_at_any_place_is_that_of_all_bytes(algorithm: str, seed: int) -> None:
    """However the bytes are cut, and whether or not the state is saved and restored at a cut, the digest at each cut
    equals that of hashlib."""
    running, at = start_digest(algorithm), 0
    for cut in _cuts(seed):
        running.update(BODY[at:cut])
        at = cut
        assert running.digest().encoded == hashlib.new(algorithm, BODY[:at]).hexdigest()
        restored = restore_digest(algorithm, running.save())
        assert restored is not None
        running = restored
    assert running.digest() == f"{algorithm}:{hashlib.new(algorithm, BODY).hexdigest()}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_digest_that_goes_on_does_not_change_what_was_saved(algorithm: str) -> None:
    """A saved state does not change when its digest is updated."""
    running = start_digest(algorithm)
    running.update(BODY[:1000])
    saved = running.save()
    running.update(BODY[1000:])
    restored = restore_digest(algorithm, saved)
    assert restored is not None
    assert restored.digest().encoded == hashlib.new(algorithm, BODY[:1000]).hexdigest()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: memoryview(bytearray(data))])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_kind_of_buffer_is_digested_alike(algorithm: str, kind: Callable[[bytes], Data]) -> None:
    """bytes, bytearray and memoryviews, writable or not, and empty buffers, give the same digest."""
    running = start_digest(algorithm)
    running.update(kind(b""))
    running.update(kind(BODY[:777]))
    assert running.digest().encoded == hashlib.new(algorithm, BODY[:777]).hexdigest()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_state_that_is_none_is_not_restored(algorithm: str) -> None:
    """An empty state, one of a wrong length, and one of another algorithm are not restored: the bytes have to be read
    again."""
    state = start_digest("sha512" if algorithm == "sha256" else "sha256").save()
    assert restore_digest(algorithm, None) is None
    assert restore_digest(algorithm, b"short") is None
    assert restore_digest(algorithm, state) is None


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_digest_that_cannot_be_saved_is_right_as_well(algorithm: str) -> None:
    """The digest over hashlib gives the same result, and has no state."""
    running = HashlibDigest(algorithm)
    running.update(BODY[:10])
    running.update(memoryview(BODY)[10:])
    assert running.digest() == f"{algorithm}:{hashlib.new(algorithm, BODY).hexdigest()}"
    assert running.save() is None


@pytest.mark.parametrize("algorithm", ["md5", "SHA256", "", "sha256 "])
def test_an_algorithm_that_is_not_supported_is_refused(algorithm: str) -> None:
    """Only sha256 and sha512, in lower case, are supported."""
    with pytest.raises(DigestInvalid):
        start_digest(algorithm)
