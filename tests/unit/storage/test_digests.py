"""Running digests: the state of a digest over the bytes so far can be saved, restored and continued."""

from __future__ import annotations

import _hashlib
import hashlib
import random
from collections.abc import Callable

import pytest

from storage import running_digest
from storage.errors import DigestInvalid
from storage.names import ALGORITHMS
from storage.running_digest import Data, HashlibDigest, restore_digest, start_digest

BODY = random.Random(1).randbytes(100_003)


def _random_offsets(seed: int, most: int = 12) -> list[int]:
    """Returns ascending offsets in BODY, most of them at or near the end of a block of the hash function."""
    rng = random.Random(seed)
    offsets = [rng.choice((64, 128)) * rng.randrange(700) + rng.randint(-1, 1) for _ in range(rng.randrange(most))]
    return [0, *sorted(min(max(offset, 0), len(BODY)) for offset in offsets), len(BODY)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("seed", range(40))
def test_a_digest_saved_and_restored_at_any_offset_is_correct(algorithm: str, seed: int) -> None:
    """The state of a digest is saved and restored at random offsets. At each offset, the digest equals that of
    hashlib."""
    running, position = start_digest(algorithm), 0
    for offset in _random_offsets(seed):
        running.update(BODY[position:offset])
        position = offset
        assert running.digest().encoded == hashlib.new(algorithm, BODY[:position]).hexdigest()
        restored = restore_digest(algorithm, running.save())
        assert restored is not None
        running = restored
    assert running.digest() == f"{algorithm}:{hashlib.new(algorithm, BODY).hexdigest()}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_saved_state_does_not_change(algorithm: str) -> None:
    """A saved state does not change when the digest is updated afterwards."""
    running = start_digest(algorithm)
    running.update(BODY[:1000])
    saved = running.save()
    running.update(BODY[1000:])
    restored = restore_digest(algorithm, saved)
    assert restored is not None
    assert restored.digest().encoded == hashlib.new(algorithm, BODY[:1000]).hexdigest()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: memoryview(bytearray(data))])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_kind_of_buffer_gives_the_same_digest(algorithm: str, kind: Callable[[bytes], Data]) -> None:
    """The bytes may be given as bytes, as a bytearray, or as a memoryview that is writable or not. An empty buffer does
    not change the digest."""
    running = start_digest(algorithm)
    running.update(kind(b""))
    running.update(kind(BODY[:777]))
    assert running.digest().encoded == hashlib.new(algorithm, BODY[:777]).hexdigest()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_invalid_state_is_not_restored(algorithm: str) -> None:
    """A state that is missing, has a wrong length or is of another algorithm is not restored, so the bytes have to be
    read again."""
    state = start_digest("sha512" if algorithm == "sha256" else "sha256").save()
    assert restore_digest(algorithm, None) is None
    assert restore_digest(algorithm, b"short") is None
    assert restore_digest(algorithm, state) is None


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_hashlib_digest_is_correct_and_cannot_be_saved(algorithm: str) -> None:
    """`HashlibDigest` gives the right digest. Its state cannot be saved."""
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


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_python_with_its_own_openssl_uses_that_of_the_machine(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If OpenSSL is linked statically into Python, `_hashlib` has no file. The state of a digest can still be saved, by
    the libcrypto that the program contains or that is installed on the machine."""
    monkeypatch.delattr(_hashlib, "__file__")
    functions = running_digest._libcrypto_hash.__wrapped__(algorithm)
    assert functions is not None
    monkeypatch.setattr(running_digest, "_libcrypto_hash", lambda _: functions)
    test_a_digest_saved_and_restored_at_any_offset_is_correct(algorithm, 1)


def test_a_library_without_the_functions_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no file has the functions, the state of a digest cannot be saved."""
    monkeypatch.setattr(running_digest, "_library_files", lambda: ["/nowhere/libcrypto.so", "libm.so.6"])
    assert running_digest._libcrypto_hash.__wrapped__("sha256") is None
