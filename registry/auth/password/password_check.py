"""Checks passwords, throttled, and without revealing which accounts exist."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from registry.auth.password.hashing import (
    MAX_PASSWORD_BYTES,
    HashingPool,
    StoredHash,
    hash_password,
    needs_rehash,
    verify_password,
)
from registry.auth.password.htpasswd import HtpasswdFile
from registry.auth.password.throttle import LoginThrottle
from registry.auth.rights.principal import Identity
from registry.auth.secret_cache import SecretCache
from registry.single_flight import start_detached
from storage.access import AccountKind, AccountName, AccountUnknown
from storage.accounts import Accounts
from storage.errors import RegistryError, Unauthorized

log = logging.getLogger(__name__)

WRONG_CACHED_SECONDS: Final = 86400.0
"""How long the same wrong password from the same address is refused without being hashed or counted again, while its
account stays the same. It may be the login for another registry that docker sends to every mirror."""


@dataclass(slots=True)
class _WrongPassword:
    """A password that was wrong for `held`, under `epoch` of the accounts and version `file` of the htpasswd file.
    `until` is when it is checked again, in seconds since 1970."""

    held: tuple[StoredHash, Identity | None]
    epoch: int
    file: str
    until: float


class PasswordCheck:
    """Checks passwords, for one process and its event loop. `clock` gives seconds since 1970. An account of the store
    has precedence over a line of the htpasswd file."""

    def __init__(
        self,
        accounts: Accounts,
        hashing: HashingPool,
        throttle: LoginThrottle,
        clock: Callable[[], float],
        htpasswd: HtpasswdFile | None = None,
    ) -> None:
        self._accounts = accounts
        self._hashing = hashing
        self._throttle = throttle
        self._clock = clock
        self._htpasswd = htpasswd
        self._wrong = SecretCache[_WrongPassword]()
        self._rehashes: set[asyncio.Task[None]] = set()

    async def check(self, name: AccountName, password: str, address: str) -> Identity:
        """Returns the identity that the right password proves. Raises Unauthorized, TooManyRequests.

        An account that does not exist, is disabled, or has no password takes as long as a wrong password, and counts as
        a failure like one. A client with an old password in its configuration sends it over and over; it counts once
        within `WRONG_CACHED_SECONDS`, so it does not throttle the account's owner at the same address.
        """
        if len(password.encode()) > MAX_PASSWORD_BYTES:
            raise Unauthorized("the password is too long")
        key = self._wrong.key_of(name, password, address)
        if self._was_wrong(key, name):
            raise Unauthorized("the password is wrong, as before")
        self._throttle.check(name, address)
        epoch, file = self._accounts.epoch(), self._file_version()
        held, identity = self._held(name)
        right = await self._hashing.run(partial(verify_password, password, held))
        if not right or identity is None:
            self._wrong.put(key, _WrongPassword((held, identity), epoch, file, self._clock() + WRONG_CACHED_SECONDS))
            await self._throttle.record_failure(name, address)
            raise Unauthorized("the password is wrong" if identity else "there is no such account with a password")
        await self._throttle.record_success(name, address)
        if held.argon2 is not None and needs_rehash(held.argon2):
            self._start_rehash(name, held.argon2, password)
        return identity

    async def aclose(self) -> None:
        """Waits for rehashes that are running."""
        await asyncio.gather(*self._rehashes, return_exceptions=True)

    def _was_wrong(self, key: bytes, name: AccountName) -> bool:
        """Returns whether this password was wrong before and nothing has changed since. Looks at the account only after
        a change in the store or the file."""
        wrong = self._wrong.get(key)
        if wrong is None:
            return False
        if self._clock() < wrong.until:
            epoch, file = self._accounts.epoch(), self._file_version()
            if (wrong.epoch, wrong.file) == (epoch, file) or wrong.held == self._held(name):
                wrong.epoch, wrong.file = epoch, file
                return True
        self._wrong.remove(key)
        return False

    def _file_version(self) -> str:
        return self._htpasswd.version if self._htpasswd else ""

    def _held(self, name: AccountName) -> tuple[StoredHash, Identity | None]:
        """Returns the hash to check a password against, and the identity that a right password proves; None if no
        password is right."""
        highest = self._htpasswd.highest_cost if self._htpasswd else 0
        try:
            account = self._accounts.account(name)
        except AccountUnknown:
            line = self._htpasswd.line(name) if self._htpasswd else None
            if line is None:
                return StoredHash(highest_cost=highest), None
            return StoredHash(bcrypt=line.hash, highest_cost=highest), Identity(name, stamp=line.stamp)
        argon2 = self._accounts.password_hash(name)
        if argon2 is None or not account.enabled:
            return StoredHash(highest_cost=highest), None
        robot = account.kind is AccountKind.ROBOT
        return StoredHash(argon2=argon2, highest_cost=highest), Identity(name, robot=robot, version=account.version)

    def _start_rehash(self, name: AccountName, old: str, password: str) -> None:
        """Starts to hash a password that was right with the current parameters."""
        task = start_detached(self._rehash(name, old, password))
        self._rehashes.add(task)
        task.add_done_callback(self._rehashes.discard)

    async def _rehash(self, name: AccountName, old: str, password: str) -> None:
        try:
            new = await self._hashing.run(partial(hash_password, password))
            await self._accounts.improve_hash(name, old, new)
        except RegistryError as error:
            log.warning("the password hash of %s stays as it is: %s", name, error)
