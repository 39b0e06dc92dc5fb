"""`Finding`: one result of a check, for people and for programs; and `run_checks`, which runs many checks at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

from storage.errors import RegistryError

T = TypeVar("T")
CHECK_SECONDS: Final = 15.0
"""Time limit of a check."""


class Level(StrEnum):
    """How bad a finding is. A *warning* says what may go wrong later or only for some; a *problem* says what does not
    work."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check.

    - `check`: the name of the check, such as `disk`.
    - `what`: what was found, in one sentence. `why`: what that leads to, or where it comes from.
    - `next_step`: what to do; empty if nothing is wrong.
    - `file` and `lines`: what to write, and into which file; empty if that is not the solution."""

    check: str
    level: Level
    what: str
    why: str = ""
    next_step: str = ""
    file: str = ""
    lines: str = ""

    def as_json(self) -> dict[str, Any]:
        """Returns the finding for JSON."""
        return {
            "check": self.check,
            "level": self.level.value,
            "what": self.what,
            "why": self.why or None,
            "next": self.next_step or None,
            "file": self.file or None,
            "lines": self.lines or None,
        }


def ok(check: str, what: str) -> Finding:
    """Returns a finding that says that all is well."""
    return Finding(check, Level.OK, what)


def warning(check: str, what: str, why: str = "", next_step: str = "", *, file: str = "", lines: str = "") -> Finding:
    """Returns a finding of what may go wrong."""
    return Finding(check, Level.WARNING, what, why, next_step, file, lines)


def problem(check: str, what: str, why: str = "", next_step: str = "", *, file: str = "", lines: str = "") -> Finding:
    """Returns a finding of what does not work."""
    return Finding(check, Level.PROBLEM, what, why, next_step, file, lines)


def worst_level(findings: Iterable[Finding]) -> Level:
    """Returns the worst of the levels; `OK` if there are no findings."""
    order = list(Level)
    return max((finding.level for finding in findings), key=order.index, default=Level.OK)


Check = Callable[[], Awaitable[Sequence[Finding]]]
"""Looks at one thing and returns what it finds."""


async def run_checks(checks: Mapping[str, Check], seconds: float = CHECK_SECONDS) -> list[Finding]:
    """Runs all checks at the same time, and returns their findings in the order of the checks. A check that takes more
    than `seconds`, or fails itself, has a finding that says so."""
    results = await asyncio.gather(*(_run(name, check, seconds) for name, check in checks.items()))
    return [finding for findings in results for finding in findings]


async def _run(name: str, check: Check, seconds: float) -> Sequence[Finding]:
    try:
        async with asyncio.timeout(seconds):
            return await check()
    except TimeoutError:
        return [
            problem(
                name,
                f"the check did not end within {seconds:g} s",
                "what it looks at, such as a disk, a name server or an upstream, does not respond",
                "look at the other findings first, then run the command again",
            )
        ]
    except (RegistryError, OSError) as error:
        return [problem(name, f"the check failed: {error}", next_step="solve that, then run the command again")]
    except Exception as error:  # the other findings may be what somebody needs now
        what = f"the check itself failed: {type(error).__name__}: {error}"
        return [problem(name, what, "this is a mistake in Entrepot", "report it with the output of this command")]


async def in_thread(call: Callable[[], T]) -> T:
    """Runs a blocking call in a thread of its own, and returns its result. If the caller is cancelled, the thread goes
    on, but the program can end nevertheless, in contrast to a thread of `asyncio.to_thread`."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def set_result(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = call()
        except BaseException as error:
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(set_result, result, failure)

    threading.Thread(target=run, daemon=True, name="check").start()
    return await future
