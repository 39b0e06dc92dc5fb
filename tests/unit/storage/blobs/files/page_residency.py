"""Tells tests which pages of a file are in the kernel's page cache."""

from __future__ import annotations

import ctypes
import mmap


def resident_pages(fd: int, size: int) -> set[int]:
    """Returns the numbers of the file's pages that are in the page cache (mincore(2))."""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    address = library.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    count = -(-size // mmap.PAGESIZE)  # rounded up
    residency = ctypes.create_string_buffer(count)
    assert library.mincore(address, size, residency) == 0
    library.munmap(address, size)
    return {number for number in range(count) if residency.raw[number] & 1}
