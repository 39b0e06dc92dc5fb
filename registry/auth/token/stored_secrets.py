"""Functions for the secrets of API tokens and login sessions, and the tasks that record their last use
(`LastUseWrites`).

The store keeps only the SHA-256 of each secret (`hash_secret`). The hash needs no salt, because each secret has 256
random bits.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from registry.single_flight import start_detached


def hash_secret(secret: str) -> bytes:
    """Returns the hash of a secret. Raises UnicodeEncodeError if the secret is not ASCII."""
    return hashlib.sha256(secret.encode("ascii")).digest()


def has_hash(secret: str, secret_hash: bytes) -> bool:
    """Returns whether the secret has this hash. Compares in constant time. Raises UnicodeEncodeError if the secret is
    not ASCII."""
    return hmac.compare_digest(hash_secret(secret), secret_hash)


class LastUseWrites:
    """The running tasks that record in the store when an API token or a login session was last used. There is at most
    one task for each token or session. Call the methods from one event loop only."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """The tasks, by the id of the token or session."""

    def start(self, used_id: str, write: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Starts a task that runs `write()` for the token or session with this id, unless such a task is running.
        `write` must log its own errors, because this class ignores them."""
        running = self._tasks.get(used_id)
        if running is None or running.done():
            task = self._tasks[used_id] = start_detached(write())
            task.add_done_callback(partial(self._forget, used_id))

    def _forget(self, used_id: str, task: asyncio.Task[None]) -> None:
        """Forgets an ended task, unless a newer task with this id has started."""
        if self._tasks.get(used_id) is task:
            del self._tasks[used_id]

    async def wait_until_idle(self) -> None:
        """Waits until the tasks that run now have ended. Does not wait for tasks that start later. Ignores the errors
        of tasks. If the caller is cancelled, cancels the tasks."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
