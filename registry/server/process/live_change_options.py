"""`LiveChangeOptions`: the options for reloads and restarts of the running server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from registry.server.process.live_change import ConfigurationSource, Proposal
from registry.server.process.successor import Handover, Successor
from registry.server.process.systemd import Notifier


class FixedConfiguration:
    """A `ConfigurationSource` for a server without a configuration: a reload only reads the certificates again."""

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
    """The path of the control socket, over which commands ask for a reload or a restart; None: there is none."""
    successor: Successor | None = None
    """The program that takes over at a restart; None: a restart only replaces the workers by new forks."""
    handover: Handover | None = None
    """At a restart, a process executes a new version of its program (execve(2)). This is what the old version passes to
    the new one, such as its sockets and workers. None: this is an ordinary start."""
    counts_memory: tuple[int, str] | None = None
    """The file descriptor of the shared memory with the application's counters, and a text that identifies the
    layout of this memory. A new version of the program goes on counting in this memory. None: the counters of the new
    version start from 0."""
    notifier: Notifier = field(default_factory=lambda: Notifier(None))
    """Reports the state of the server to the service manager. The default reports nothing."""
