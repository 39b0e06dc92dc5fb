"""`LiveChangeOptions`: the options for reloads and restarts of the running server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from registry.server.process.live_change import ConfigurationSource, Proposal
from registry.server.process.successor import Handover, Successor
from registry.server.process.systemd import Notifier


class FixedConfiguration:
    """A `ConfigurationSource` for a server without a configuration. Its proposal is always empty. So a reload changes
    no setting, and only reads the certificates again."""

    def propose(self) -> Proposal:
        return Proposal(b"", "")

    def accept(self, proposal: Proposal) -> None:
        """Does nothing."""


@dataclass(frozen=True)
class LiveChangeOptions:
    """The options for reloads and restarts of the running server. The defaults are for an application without a
    configuration."""

    configuration_source: ConfigurationSource = field(default_factory=FixedConfiguration)
    """Reads the configuration at a reload."""
    control: Path | None = None
    """The path of the control socket, over which commands ask for a reload or a restart; None: no such socket."""
    successor: Successor | None = None
    """The program that takes over at a restart; None: a restart only replaces the workers by new forks."""
    handover: Handover | None = None
    """What the old version of the program has passed to this version at a restart, such as its sockets and workers. A
    restart executes the new version in the same process (execve(2)). None: this is an ordinary start."""
    counts_memory: tuple[int, str] | None = None
    """The memory of the application's counts: the file descriptor of the shared memory that contains the counts, and a
    text that identifies the layout of this memory. After a restart, the new version of the program continues the
    counts. None: the counts start from 0."""
    notifier: Notifier = field(default_factory=lambda: Notifier(None))
    """Reports the state of the server to the service manager. The default reports nothing."""
