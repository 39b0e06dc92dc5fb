"""Digests that are computed while bytes arrive, and whose state another process can continue from (`RunningDigest`).

`hashlib` cannot export its state, but libcrypto's SHA256_CTX and SHA512_CTX are plain structures that can be copied.
They are reached through the library that `hashlib` is linked to. Where that is not available, `save` returns None, and
the next owner reads the bytes again.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from functools import cache
from typing import Any, NamedTuple, Protocol

from storage.names import Digest, as_algorithm

Data = bytes | bytearray | memoryview


class RunningDigest(Protocol):
    """Digest of the bytes so far. `update` lets other threads run."""

    algorithm: str

    def update(self, data: Data) -> None: ...

    def digest(self) -> Digest:
        """Returns the digest of all bytes so far; more may follow."""
        ...

    def save(self) -> bytes | None:
        """Returns the state, for `restore_digest` on this machine; None where it cannot be exported."""
        ...


class _Calls(NamedTuple):
    size: int
    length: int
    init: Any
    update: Any
    final: Any


# SHA256_CTX: 8 words, a 64-bit count, a block of 64 bytes, two ints. SHA512_CTX: the same with words twice as wide.
_LAYOUT = {"sha256": (112, 32), "sha512": (216, 64)}


class LibcryptoDigest:
    """A RunningDigest over libcrypto's own structure."""

    def __init__(self, algorithm: str, calls: _Calls, state: bytes | None = None) -> None:
        self.algorithm = algorithm
        self._calls = calls
        self._state = ctypes.create_string_buffer(calls.size)
        if state is None:
            calls.init(self._state)
        else:
            ctypes.memmove(self._state, state, calls.size)

    def update(self, data: Data) -> None:
        view = memoryview(data)
        if view.nbytes == 0:
            return
        if isinstance(data, bytes):
            self._calls.update(self._state, data, view.nbytes)
        elif view.readonly:
            self._calls.update(self._state, bytes(view), view.nbytes)
        else:
            first = ctypes.c_char.from_buffer(view)  # holds the memory; an array type of each length would cost more
            self._calls.update(self._state, ctypes.addressof(first), view.nbytes)

    def digest(self) -> Digest:
        copy = ctypes.create_string_buffer(self._state.raw, self._calls.size)
        result = ctypes.create_string_buffer(self._calls.length)
        self._calls.final(result, copy)
        return Digest(f"{self.algorithm}:{result.raw.hex()}")

    def save(self) -> bytes | None:
        return self._state.raw


class HashlibDigest:
    """A RunningDigest that cannot be saved."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self._running = hashlib.new(algorithm)

    def update(self, data: Data) -> None:
        self._running.update(data)

    def digest(self) -> Digest:
        return Digest(f"{self.algorithm}:{self._running.hexdigest()}")

    def save(self) -> bytes | None:
        return None


@cache
def _libcrypto(algorithm: str) -> _Calls | None:
    """Returns libcrypto's functions, or None if a test shows that its structures have another layout than `_LAYOUT`."""
    size, length = _LAYOUT[algorithm]
    try:
        import _hashlib

        library = ctypes.CDLL(_hashlib.__file__)
        name = algorithm.upper()
        calls = _Calls(
            size, length, getattr(library, f"{name}_Init"), getattr(library, f"{name}_Update"),
            getattr(library, f"{name}_Final"),
        )  # fmt: skip
    except (ImportError, OSError, AttributeError):
        return None
    calls.init.argtypes = [ctypes.c_void_p]
    calls.update.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    calls.final.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    sample = bytes(range(256)) * 3
    first = LibcryptoDigest(algorithm, calls)
    first.update(sample[:100])
    second = LibcryptoDigest(algorithm, calls, first.save())
    second.update(sample[100:])
    right = second.digest().encoded == hashlib.new(algorithm, sample).hexdigest()
    return calls if right and sys.byteorder == "little" else None


def start_digest(algorithm: str) -> RunningDigest:
    """Returns the digest of no bytes yet. Raises DigestInvalid for an algorithm that is not supported."""
    calls = _libcrypto(as_algorithm(algorithm))
    return LibcryptoDigest(algorithm, calls) if calls else HashlibDigest(algorithm)


def restore_digest(algorithm: str, state: bytes | None) -> RunningDigest | None:
    """Restores a saved digest. Returns None where that is impossible and the bytes must be read again."""
    calls = _libcrypto(as_algorithm(algorithm))
    if calls is None or state is None or len(state) != calls.size:
        return None
    return LibcryptoDigest(algorithm, calls, state)
