"""Lets an `entrepot` command kill itself with SIGKILL in the middle of its work. A test that kills a command from
outside may come too late, because the command goes on while the machine does not run the test."""

from __future__ import annotations

import functools
import itertools
import os
import pkgutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.fakes.commands import STACK_DUMP_SITE


def killing_site(folder: Path, count: int, *functions: str) -> str:
    """Returns the path of a file in `folder`, for the parameter `site` of `entrepot`. The command then kills itself at
    the end of call number `count` of these functions, which are named like `package.module:Class.method`. They are not
    coroutine functions. The number counts the calls of all of them, from 1."""
    file = folder / "killing_site.py"
    file.write_text(
        f"import runpy\nfrom {__name__} import kill_after\nrunpy.run_path({STACK_DUMP_SITE!r})\n"
        f"kill_after({count}, {functions!r})\n"
    )
    return str(file)


def kill_after(count: int, functions: tuple[str, ...]) -> None:
    """Replaces the functions, so that this process is killed at the end of call number `count`."""
    numbers = itertools.count(1)
    for function in functions:
        owner_name, _, name = function.rpartition(".")
        owner = pkgutil.resolve_name(owner_name)
        setattr(owner, name, _killing(getattr(owner, name), numbers, count))


def _killing(function: Callable[..., Any], numbers: Iterator[int], count: int) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        if next(numbers) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call
