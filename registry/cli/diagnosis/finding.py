"""`Finding`: one result of a check of the machine or the configuration. `run_checks`: runs many checks at the same
time."""

from __future__ import annotations

import asyncio
import pwd
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

from storage.errors import RegistryError

T = TypeVar("T")
CHECK_SECONDS: Final = 15.0
"""Default time limit of a check."""


class Level(StrEnum):
    """How bad a finding is. `WARNING`: something may fail later, or fails only for some users. `PROBLEM`: something
    does not work."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check.

    - `check`: the name of the check.
    - `what`: what the check has found, in one sentence.
    - `why`: the cause or the consequence of `what`; can be empty.
    - `next_step`: what the user should do; can be empty.
    - `file`: the file into which the user should write `lines`. Both are empty if nothing has to be written."""

    check: str
    level: Level
    what: str
    why: str = ""
    next_step: str = ""
    file: str = ""
    lines: str = ""

    def as_json(self) -> dict[str, Any]:
        """Returns the finding as JSON. None stands for an empty text."""
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
    """Returns a finding without a problem."""
    return Finding(check, Level.OK, what)


def warning(check: str, what: str, why: str = "", next_step: str = "", *, file: str = "", lines: str = "") -> Finding:
    """Returns a finding about something that may fail."""
    return Finding(check, Level.WARNING, what, why, next_step, file, lines)


def problem(check: str, what: str, why: str = "", next_step: str = "", *, file: str = "", lines: str = "") -> Finding:
    """Returns a finding about something that does not work."""
    return Finding(check, Level.PROBLEM, what, why, next_step, file, lines)


def worst_level(findings: Iterable[Finding]) -> Level:
    """Returns the worst level of the findings; `OK` if there are no findings."""
    order = list(Level)
    return max((finding.level for finding in findings), key=order.index, default=Level.OK)


Check = Callable[[], Awaitable[Sequence[Finding]]]


async def run_checks(checks: Mapping[str, Check], seconds: float = CHECK_SECONDS) -> list[Finding]:
    """Runs all checks at the same time, and returns their findings in the order of `checks`. For a check that raises an
    error or takes longer than `seconds`, the result has a problem with the name of the check."""
    results = await asyncio.gather(*(_run(name, check, seconds) for name, check in checks.items()))
    return [finding for findings in results for finding in findings]


async def _run(name: str, check: Check, seconds: float) -> Sequence[Finding]:
    """Runs one check. After a timeout or an error, returns one problem."""
    try:
        async with asyncio.timeout(seconds):
            return await check()
    except TimeoutError:
        return [
            problem(
                name,
                f"the check did not end within {seconds:g} s",
                "something that the check needs does not respond, such as a disk, a name server or an upstream",
                "look at the other findings first, then run the command again",
            )
        ]
    except (RegistryError, OSError) as error:
        return [problem(name, f"the check failed: {error}", next_step="solve this problem, then run the command again")]
    except Exception as error:  # an error in one check must not hide the findings of the others
        what = f"the check itself failed: {type(error).__name__}: {error}"
        return [problem(name, what, "this is a bug in Entrepot", "report it with the output of this command")]


async def in_thread(call: Callable[[], T]) -> T:
    """Runs a blocking call in a new thread, and returns its result. After a cancellation, the thread continues. Unlike
    a thread of `asyncio.to_thread`, the thread does not keep the program from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def set_outcome(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, raised = None, None
        try:
            result = call()
        except BaseException as error:
            raised = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(set_outcome, result, raised)

    threading.Thread(target=run, daemon=True, name="check").start()
    return await future


def user_name(uid: int) -> str:
    """Returns the name of the user with this uid. If there is no such user, returns a text such as `uid 12345`."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
