"""Types that describe a change of the configuration while the server runs.

A *reload* has two phases. First every worker prepares the new configuration, while the old configuration is still in
use. If all workers succeed, all of them switch to the new configuration. Otherwise all of them discard it. The server
handles a configuration only as bytes: a `ConfigurationSource` makes the bytes in the parent process, and the
application of each worker parses them.
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
    """The bytes that the application of each worker gets."""
    changes: str
    """A description of the differences from the configuration in force; empty if there are no differences."""


class ConfigurationSource(Protocol):
    """Reads the configuration, and remembers which configuration is in force. Used in the parent process."""

    def propose(self) -> Proposal:
        """Reads and checks the whole configuration. Raises ChangeRefused if the configuration is not valid, or if it
        changes a setting that cannot change while the server runs."""

    def accept(self, proposal: Proposal) -> None:
        """Makes the proposal the configuration in force. Workers that start later use it."""


@runtime_checkable
class LiveApplication(Protocol):
    """An application that can change its configuration while it runs, and can leave its background work to other
    workers. Used in a worker."""

    async def prepare(self, configuration: bytes) -> None:
        """Prepares to use the configuration. May raise any exception; then the configuration in use does not change."""

    async def switch(self) -> None:
        """Uses the prepared configuration for all new requests."""

    async def discard(self) -> None:
        """Discards the prepared configuration."""

    async def retire(self) -> None:
        """Makes the application start no more background work, because the worker is about to end."""

    async def finish(self) -> None:
        """Waits until the background work has ended. Called after `retire`."""


@dataclass(frozen=True, slots=True)
class ChangeOutcome:
    """How a change of the running server has ended. `ok`: whether the change succeeded. `message`: one line for
    people."""

    ok: bool
    message: str


Reply = Callable[[ChangeOutcome], None]
"""A function that the server calls with the outcome of a change when the change has ended."""


def reload_outcome(proposal: Proposal) -> ChangeOutcome:
    """Returns the outcome of a reload that has put the proposal in force."""
    return ChangeOutcome(
        True, f"reloaded: {proposal.changes}" if proposal.changes else "reloaded: no setting has changed"
    )
