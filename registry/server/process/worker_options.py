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
    """The options of the workers. Times are in seconds."""

    make_app: Callable[[], AsgiApp]
    """Called in each worker, after the fork. Returns the application."""
    sockets: Sequence[socket.socket]
    """The listening sockets from which the workers accept connections."""
    grace_seconds: float
    """How long the requests in progress may continue after a worker was told to stop."""
    retire_seconds: float
    """How long a worker may continue to serve its connections after a restart has replaced the worker."""
    limits: ServerLimits
    listener_options: ListenerOptions
