"""Whether a password is an account's, at its pace, and without telling which accounts there are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from registry.auth.password.hashing import (
    LONGEST_PASSWORD,
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
from registry.request import detached_context
from storage.access import AccountKind, AccountName, AccountUnknown
from storage.accounts import Accounts
from storage.errors import RegistryError, Unauthorized

log = logging.getLogger(__name__)

WRONG_CACHED_SECONDS: Final = 86400.0
"""Seconds for which the same wrong password from the same address is refused without being hashed or counted, while its
account stays what it is. It may be the login at another registry that docker shows to every mirror."""


@dataclass(slots=True)
class _WrongPassword:
    """What was wrong against `held`, when it was checked; so it was under `epoch` and `file` (the htpasswd file's
    version) as well."""

    held: tuple[StoredHash, Identity | None]
    epoch: int
    file: str
    until: float


class PasswordCheck:
    """For one process and its event loop. `clock`: seconds since 1970. An account of the store has precedence over a
    line of the htpasswd file."""

    def __init__(
        self,
        accounts: Accounts,
        hashing: HashingPool,
        pace: LoginThrottle,
        clock: Callable[[], float],
        htpasswd: HtpasswdFile | None = None,
    ) -> None:
        self._accounts = accounts
        self._hashing = hashing
        self._pace = pace
        self._clock = clock
        self._htpasswd = htpasswd
        self._wrong = SecretCache[_WrongPassword]()
        self._improving: set[asyncio.Task[None]] = set()

    async def check(self, name: AccountName, password: str, address: str) -> Identity:
        """What the right password proves. Raises Unauthorized, TooManyRequests. An account that is not there, is
        disabled, or has no password takes as long as a wrong password, and is counted like one.

        A client that has an old password stored shows it over and over. That is no guessing, so it is counted once in a
        while only, and does not hold back the account's owner beside it."""
        if len(password.encode()) > LONGEST_PASSWORD:
            raise Unauthorized("the password is too long")
        key = self._wrong.key_of(name, password, address)
        if self._was_wrong(key, name):
            raise Unauthorized("the password is wrong, as before")
        self._pace.check(name, address)
        epoch, file = self._accounts.epoch(), self._file_version()
        held, proof = self._held(name)
        right = await self._hashing.run(partial(verify_password, password, held))
        if not right or proof is None:
            self._wrong.put(key, _WrongPassword((held, proof), epoch, file, self._clock() + WRONG_CACHED_SECONDS))
            await self._pace.failed(name, address)
            raise Unauthorized("the password is wrong" if proof else "there is no such account with a password")
        await self._pace.record_success(name, address)
        if held.argon2 is not None and needs_rehash(held.argon2):
            self._improve(name, held.argon2, password)
        return proof

    async def aclose(self) -> None:
        """Waits for hashes that are being improved."""
        await asyncio.gather(*self._improving, return_exceptions=True)

    def _was_wrong(self, key: bytes, name: AccountName) -> bool:
        """Looks at the account only after a change anywhere: that takes longer where there is one."""
        wrong = self._wrong.get(key)
        if wrong is None:
            return False
        if self._clock() < wrong.until:
            epoch, file = self._accounts.epoch(), self._file_version()
            if (wrong.epoch, wrong.file) == (epoch, file) or wrong.held == self._held(name):
                wrong.epoch, wrong.file = epoch, file
                return True
        self._wrong.drop(key)
        return False

    def _file_version(self) -> str:
        return self._htpasswd.version if self._htpasswd else ""

    def _held(self, name: AccountName) -> tuple[StoredHash, Identity | None]:
        """What to check a password against, and what it then proves; None: nothing, whatever the password."""
        dearest = self._htpasswd.highest_cost if self._htpasswd else 0
        try:
            account = self._accounts.account(name)
        except AccountUnknown:
            line = self._htpasswd.line(name) if self._htpasswd else None
            if line is None:
                return StoredHash(highest_cost=dearest), None
            return StoredHash(bcrypt=line.hash, highest_cost=dearest), Identity(name, stamp=line.stamp)
        argon2 = self._accounts.password_hash(name)
        if argon2 is None or not account.enabled:
            return StoredHash(highest_cost=dearest), None
        robot = account.kind is AccountKind.ROBOT
        return StoredHash(argon2=argon2, highest_cost=dearest), Identity(name, robot=robot, version=account.version)

    def _improve(self, name: AccountName, old: str, password: str) -> None:
        """Now that the password is known, hashes it with the parameters of now."""
        task = asyncio.create_task(self._rehash(name, old, password), context=detached_context())
        self._improving.add(task)
        task.add_done_callback(self._improving.discard)

    async def _rehash(self, name: AccountName, old: str, password: str) -> None:
        try:
            new = await self._hashing.run(partial(hash_password, password))
            await self._accounts.improve_hash(name, old, new)
        except RegistryError as error:
            log.warning("the password hash of %s stays as it is: %s", name, error)
