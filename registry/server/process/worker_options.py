"""`WorkerOptions`: the options that all worker processes of a server share."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from registry.asgi import AsgiApp
from registry.server.gate.listener import ListenerOptions
from registry.server.server_limits import ServerLimits


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """The application, sockets, time limits and other options of the workers. Times are in seconds."""

    make_app: Callable[[], AsgiApp]
    """Called in each worker, after the fork. Returns the application."""
    sockets: Sequence[socket.socket]
    """The workers accept connections from these sockets, which must be listening."""
    grace_seconds: float
    """How long requests in progress may continue after a worker is told to stop."""
    retire_seconds: float
    """How long a worker that was replaced in a restart may continue to serve its connections."""
    limits: ServerLimits
    listener_options: ListenerOptions
