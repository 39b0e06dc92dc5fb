"""The terms of a change of the configuration while the server runs.

A *reload* has two phases. First every worker prepares the new configuration beside the one in force. If all workers
have done so, all of them switch to the new configuration. Otherwise all of them discard it. The server knows a
configuration only as bytes: a `ConfigurationSource` makes the bytes in the parent process, and the application of each
worker reads the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


class ChangeRefused(Exception):
    """A change of the running server is refused. `message` says why, in one line."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A checked configuration that is not in force yet."""

    configuration: bytes
    """What the workers' applications get."""
    changes: str
    """What differs from the configuration in force, for people; empty if nothing does."""


class ConfigurationSource(Protocol):
    """Reads the configuration, and knows which one is in force. Used in the parent process."""

    def propose(self) -> Proposal:
        """Reads and checks the whole configuration. Raises ChangeRefused if the configuration is not valid, or if it
        changes a setting that cannot change while the server runs."""

    def accept(self, proposal: Proposal) -> None:
        """Says that the proposal is in force: workers that start from now on use it."""


@runtime_checkable
class LiveApplication(Protocol):
    """An application that can change its configuration and hand its work over. Used in a worker."""

    async def prepare(self, configuration: bytes) -> None:
        """Gets ready to use the configuration. May raise any exception; then nothing changes."""

    async def switch(self) -> None:
        """Uses the prepared configuration for all new requests."""

    async def discard(self) -> None:
        """Discards the prepared configuration."""

    async def retire(self) -> None:
        """Starts no new background work, because the worker is about to end."""

    async def finish(self) -> None:
        """Waits until the background work has ended. Called after `retire`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a change of the running server has ended. `message`: one line for people."""

    ok: bool
    message: str


Reply = Callable[[Outcome], None]
"""Gets the outcome of a change."""


def reloaded(proposal: Proposal) -> Outcome:
    """Returns the outcome of a reload that has put the proposal in force."""
    return Outcome(True, f"reloaded: {proposal.changes}" if proposal.changes else "reloaded: no setting has changed")
