"""Counts the Python instructions that a block of code runs. The count is the same on every machine, however busy it
is."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class InstructionCount:
    """A running count. `total`: the number of bytecode instructions that this thread has run since the count began. A
    call of a function written in C, such as `list.count`, counts as one instruction."""

    def __init__(self) -> None:
        self.total = 0

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        if event == "opcode":
            self.total += 1
        return self.trace


@contextmanager
def count_instructions() -> Iterator[InstructionCount]:
    """Counts the instructions of the functions that the block calls, and of the coroutines that this thread resumes
    while the block is open. The instructions of the block itself do not count. The garbage collector does not run in
    the block: it would run the finalizers of objects that earlier code left."""
    count, before, collects = InstructionCount(), sys.gettrace(), gc.isenabled()
    gc.disable()
    sys.settrace(count.trace)
    try:
        yield count
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()
