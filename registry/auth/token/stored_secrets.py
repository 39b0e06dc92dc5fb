"""What API tokens and login sessions have in common: the store keeps a hash of their secret (`hash_secret`), and the
time of their last use, which a task records (`UseWrites`).

A hash is the SHA-256 of the secret. It needs no salt, because a secret has 256 random bits, so nobody can guess it.
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
    """Returns whether the secret has this hash. Takes the same time for each wrong secret. Raises UnicodeEncodeError if
    the secret is not ASCII."""
    return hmac.compare_digest(hash_secret(secret), secret_hash)


class UseWrites:
    """The running tasks that record in the store when an API token or a login session was last used. There is at most
    one task for each token or session. Call the methods from one event loop only."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """By the id of the token or session."""

    def start(self, used_id: str, write: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Starts a task that runs `write()` for the token or session with this id, unless such a task is running.
        `write` must log its errors: nobody else sees them."""
        running = self._tasks.get(used_id)
        if running is None or running.done():
            task = self._tasks[used_id] = start_detached(write())
            task.add_done_callback(partial(self._forget, used_id))

    def _forget(self, used_id: str, task: asyncio.Task[None]) -> None:
        """Forgets an ended task, unless another one has been started since."""
        if self._tasks.get(used_id) is task:
            del self._tasks[used_id]

    async def wait_until_idle(self) -> None:
        """Waits until the running tasks have ended. Ignores their errors. If the caller is cancelled, cancels the
        tasks. `start` can still start further tasks; this method does not wait for those."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
