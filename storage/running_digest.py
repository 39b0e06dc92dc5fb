"""Digests that are computed while bytes arrive (`RunningDigest`). A computation can be saved and continued later.

`hashlib` cannot export the state of a computation. OpenSSL's libcrypto can: its SHA256_CTX and SHA512_CTX are plain C
structures, which can be copied. This module uses the first of these that works:

- The libcrypto that `hashlib` is linked to (`LibcryptoDigest`).
- The libcrypto of the machine (`LibcryptoDigest`).
- `hashlib` (`HashlibDigest`). `save` then returns None, and a caller that continues a computation must append all bytes
  again.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from functools import cache
from typing import Any, NamedTuple, Protocol

from storage.names import Digest, as_algorithm

Data = bytes | bytearray | memoryview
"""The types of data that `RunningDigest.update` accepts."""


class RunningDigest(Protocol):
    """The digest of bytes that are appended piece by piece. `algorithm`: `sha256` or `sha512`."""

    algorithm: str

    def update(self, data: Data) -> None:
        """Appends `data`. Releases the global interpreter lock while it computes."""
        ...

    def digest(self) -> Digest:
        """Returns the digest of all bytes appended so far. More bytes may be appended afterwards."""
        ...

    def save(self) -> bytes | None:
        """Returns the state of the computation, from which `restore_digest` continues on the same machine. Returns None
        if the state cannot be exported."""
        ...


class _LibcryptoHash(NamedTuple):
    """One hash algorithm of libcrypto. `state_bytes`: size of the C structure with the state of a computation.
    `digest_bytes`: length of a digest. `init`, `update`, `final`: the C functions, such as `SHA256_Init`."""

    state_bytes: int
    digest_bytes: int
    init: Any
    update: Any
    final: Any


# SHA256_CTX: 8 words of 32 bits, a count of 64 bits, a block of 64 bytes, two ints. SHA512_CTX: 8 words of 64 bits, a
# count of 128 bits, a block of 128 bytes, two ints.
_SIZES = {"sha256": (112, 32), "sha512": (216, 64)}
"""For each algorithm, the size of the C structure and the length of the digest, in bytes."""
_SYSTEM_LIBRARIES: tuple[str, ...] = ("libcrypto.so.3", "libcrypto.so.1.1")
"""File names of the machine's libcrypto. The version number in each name guarantees that the structures have the sizes
in `_SIZES`. Names without a version number must not be added: they can belong to another library, and macOS aborts a
process that loads `libcrypto.dylib`."""


class LibcryptoDigest:
    """A `RunningDigest` that libcrypto computes, with its state in a C structure."""

    def __init__(self, algorithm: str, functions: _LibcryptoHash, state: bytes | None = None) -> None:
        """`state`: a saved state to continue from; None: starts a new computation."""
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
            # libcrypto gets only the address of the first byte. While `first_byte` exists, Python neither moves nor
            # frees the buffer of `data`.
            first_byte = ctypes.c_char.from_buffer(view)
            self._functions.update(self._state, ctypes.addressof(first_byte), view.nbytes)

    def digest(self) -> Digest:
        # `final` overwrites the state, so it gets a copy.
        copy = ctypes.create_string_buffer(self._state.raw, self._functions.state_bytes)
        result = ctypes.create_string_buffer(self._functions.digest_bytes)
        self._functions.final(result, copy)
        return Digest(f"{self.algorithm}:{result.raw.hex()}")

    def save(self) -> bytes | None:
        return self._state.raw


class HashlibDigest:
    """A `RunningDigest` that `hashlib` computes. Its state cannot be saved."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self._hash = hashlib.new(algorithm)

    def update(self, data: Data) -> None:
        self._hash.update(data)

    def digest(self) -> Digest:
        return Digest(f"{self.algorithm}:{self._hash.hexdigest()}")

    def save(self) -> bytes | None:
        return None


def _library_files() -> list[str | None]:
    """Returns the files that may contain libcrypto's functions, in the order in which to try them:

    - The file of the module `_hashlib`, which is linked to libcrypto. In some builds of Python, `_hashlib` has no file
      of its own: `_hashlib` and libcrypto are parts of the Python program. The list then has None, which stands for
      the running program. If Python has no `_hashlib`, this entry is left out.
    - The names of the machine's libcrypto. Its version may differ from the version of `hashlib`'s libcrypto. The
      difference does no harm, because all functions that compute a digest come from the same file."""
    try:
        import _hashlib
    except ImportError:
        own_files: list[str | None] = []
    else:
        own_files = [getattr(_hashlib, "__file__", None)]
    return [*own_files, *_SYSTEM_LIBRARIES]


@cache
def _libcrypto_hash(algorithm: str) -> _LibcryptoHash | None:
    """Returns libcrypto's functions for the algorithm. Returns None if the functions cannot be found. Also returns None
    on big-endian machines, which this module does not support."""
    if sys.byteorder != "little":
        return None
    return next(filter(None, (_load_functions(file, algorithm) for file in _library_files())), None)


def _load_functions(file: str | None, algorithm: str) -> _LibcryptoHash | None:
    """Returns the functions for the algorithm from one of `_library_files`. Returns None if the file does not have the
    functions. Also returns None if a test computation gives a wrong digest: the structure then does not have the size
    in `_SIZES`."""
    state_bytes, digest_bytes = _SIZES[algorithm]
    try:
        library, name = ctypes.CDLL(file), algorithm.upper()
        init, update, final = (getattr(library, f"{name}_{function}") for function in ("Init", "Update", "Final"))
    except (OSError, AttributeError):
        return None
    init.argtypes = [ctypes.c_void_p]
    update.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    final.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    functions = _LibcryptoHash(state_bytes, digest_bytes, init, update, final)
    sample = bytes(range(256)) * 3
    interrupted = LibcryptoDigest(algorithm, functions)
    interrupted.update(sample[:100])
    continued = LibcryptoDigest(algorithm, functions, interrupted.save())
    continued.update(sample[100:])
    is_right = continued.digest().encoded == hashlib.new(algorithm, sample).hexdigest()
    return functions if is_right else None


def can_save_digests() -> bool:
    """Returns whether `RunningDigest.save` can export states on this machine."""
    return all(_libcrypto_hash(algorithm) is not None for algorithm in _SIZES)


def start_digest(algorithm: str) -> RunningDigest:
    """Returns the computation of a new digest, to which no bytes are appended yet. Raises DigestInvalid for an
    algorithm that is not supported."""
    functions = _libcrypto_hash(as_algorithm(algorithm))
    return LibcryptoDigest(algorithm, functions) if functions else HashlibDigest(algorithm)


def restore_digest(algorithm: str, state: bytes | None) -> RunningDigest | None:
    """Returns a computation that continues from `state`, a result of `RunningDigest.save`. Returns None if this is not
    possible; the caller must then start a new computation and append all bytes again. Raises DigestInvalid for an
    algorithm that is not supported."""
    functions = _libcrypto_hash(as_algorithm(algorithm))
    if functions is None or state is None or len(state) != functions.state_bytes:
        return None
    return LibcryptoDigest(algorithm, functions, state)
