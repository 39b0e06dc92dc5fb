"""Digests that are computed while bytes arrive, and whose state can be saved and continued later (`RunningDigest`).

`hashlib` cannot export the state of a hash. OpenSSL's libcrypto can: its SHA256_CTX and SHA512_CTX are plain
structures, which can be copied. This module calls the libcrypto that `hashlib` is linked to (`LibcryptoDigest`). If
that is not possible, it uses `hashlib` (`HashlibDigest`). Then `save` returns None, and to continue later, all bytes
must be read again.
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
    """The digest of bytes that come one after the other. `algorithm`: `sha256` or `sha512`."""

    algorithm: str

    def update(self, data: Data) -> None:
        """Appends `data`. Releases the global interpreter lock while it computes."""
        ...

    def digest(self) -> Digest:
        """Returns the digest of all bytes so far. More bytes may be appended afterwards."""
        ...

    def save(self) -> bytes | None:
        """Returns the state, for `restore_digest` on the same machine; None if it cannot be exported."""
        ...


class _LibcryptoHash(NamedTuple):
    """One hash algorithm of libcrypto. `state_bytes`: size of its structure. `digest_bytes`: length of its digest.
    `init`, `update`, `final`: its C functions, such as `SHA256_Init`."""

    state_bytes: int
    digest_bytes: int
    init: Any
    update: Any
    final: Any


# SHA256_CTX: 8 words, a 64-bit count, a block of 64 bytes, two ints. SHA512_CTX: the same with words twice as wide.
_SIZES = {"sha256": (112, 32), "sha512": (216, 64)}
"""Size of the structure and length of the digest, in bytes."""


class LibcryptoDigest:
    """A `RunningDigest` in a structure of libcrypto."""

    def __init__(self, algorithm: str, functions: _LibcryptoHash, state: bytes | None = None) -> None:
        """`state`: a saved state to continue from; None: the digest of no bytes."""
        self.algorithm = algorithm
        self._functions = functions
        self._state = ctypes.create_string_buffer(functions.state_bytes)
        if state is None:
            functions.init(self._state)
        else:
            ctypes.memmove(self._state, state, functions.state_bytes)

    def update(self, data: Data) -> None:
        view = memoryview(data)
        if view.nbytes == 0:
            return
        if isinstance(data, bytes):
            self._functions.update(self._state, data, view.nbytes)
        elif view.readonly:
            self._functions.update(self._state, bytes(view), view.nbytes)
        else:
            # A reference to the first byte keeps all the memory alive. An array type for each length would be slower.
            first_byte = ctypes.c_char.from_buffer(view)
            self._functions.update(self._state, ctypes.addressof(first_byte), view.nbytes)

    def digest(self) -> Digest:
        copy = ctypes.create_string_buffer(self._state.raw, self._functions.state_bytes)  # `final` overwrites it
        result = ctypes.create_string_buffer(self._functions.digest_bytes)
        self._functions.final(result, copy)
        return Digest(f"{self.algorithm}:{result.raw.hex()}")

    def save(self) -> bytes | None:
        return self._state.raw


class HashlibDigest:
    """A `RunningDigest` over `hashlib`, whose state cannot be saved."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self._hash = hashlib.new(algorithm)

    def update(self, data: Data) -> None:
        self._hash.update(data)

    def digest(self) -> Digest:
        return Digest(f"{self.algorithm}:{self._hash.hexdigest()}")

    def save(self) -> bytes | None:
        return None


@cache
def _libcrypto(algorithm: str) -> _LibcryptoHash | None:
    """Returns libcrypto's functions for the algorithm. Returns None if they cannot be found, or if a test computation
    with a copied structure gives a wrong digest, because the structure is not as large as `_SIZES` says."""
    state_bytes, digest_bytes = _SIZES[algorithm]
    try:
        import _hashlib

        library = ctypes.CDLL(_hashlib.__file__)
        name = algorithm.upper()
        init, update, final = (getattr(library, f"{name}_{function}") for function in ("Init", "Update", "Final"))
    except (ImportError, OSError, AttributeError):
        return None
    init.argtypes = [ctypes.c_void_p]
    update.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    final.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    functions = _LibcryptoHash(state_bytes, digest_bytes, init, update, final)
    sample = bytes(range(256)) * 3
    first = LibcryptoDigest(algorithm, functions)
    first.update(sample[:100])
    second = LibcryptoDigest(algorithm, functions, first.save())
    second.update(sample[100:])
    is_right = second.digest().encoded == hashlib.new(algorithm, sample).hexdigest()
    return functions if is_right and sys.byteorder == "little" else None


def start_digest(algorithm: str) -> RunningDigest:
    """Returns a digest to which no bytes have been appended. Raises DigestInvalid for an algorithm that is not
    supported."""
    functions = _libcrypto(as_algorithm(algorithm))
    return LibcryptoDigest(algorithm, functions) if functions else HashlibDigest(algorithm)


def restore_digest(algorithm: str, state: bytes | None) -> RunningDigest | None:
    """Returns a digest that continues from a state that `save` returned. Returns None if that is not possible, so that
    all bytes must be read again."""
    functions = _libcrypto(as_algorithm(algorithm))
    if functions is None or state is None or len(state) != functions.state_bytes:
        return None
    return LibcryptoDigest(algorithm, functions, state)
