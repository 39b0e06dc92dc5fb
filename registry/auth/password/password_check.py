"""Checks passwords of accounts in the store and in the htpasswd file. If both have an account of the same name, the
account in the store is used.

Each process hashes a right password once an hour, however many addresses send it: many machines can log in with the
same password at the same moment. A wrong password is hashed and counted as a failure again for each network that sends
it.

Failed logins are throttled. Neither the result of a check nor its duration reveals which accounts exist.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from registry.auth.password.hashing import (
    MAX_PASSWORD_BYTES,
    SALT_BYTES,
    HashingPool,
    PasswordComparison,
    StoredHash,
    compare_password,
    hash_password,
    needs_rehash,
)
from registry.auth.password.htpasswd import EMPTY_CONTENT, HtpasswdContent, HtpasswdFile
from registry.auth.password.throttle import LoginThrottle
from registry.auth.password.wrong_passwords import WrongPasswords
from registry.auth.rights.principal import Identity
from registry.auth.secret_cache import SecretCache
from registry.client_addresses import network_of, site_of
from registry.single_flight import cancel_and_wait, start_detached, wait_for_outcome
from storage.access import AccountKind, AccountName, AccountUnknown
from storage.accounts import Accounts
from storage.errors import RegistryError, Unauthorized

log = logging.getLogger(__name__)

WRONG_CACHED_SECONDS: Final = 86400.0
"""How long a wrong password is cached. If a cached password is sent again from the same network, it is refused without
a hashing. The time is long because docker sends its login for Docker Hub to every mirror of Docker Hub, again and
again."""
VERIFIED_SECONDS: Final = 3600.0
"""How long a right password is remembered. In this time it is accepted from further addresses without a hashing."""

_AccountState = tuple[StoredHash, Identity | None]
"""What the store and the htpasswd file have for an account's name: the hash of the password, and the identity that the
password proves. The identity is None if no password is right: the account does not exist, is disabled, or has no
password."""


@dataclass(slots=True)
class _FailedCheck:
    """The cache entry of a wrong password. The cache key is a hash of the account's name, the password and the client's
    network: an IPv4 address, or an IPv6 network of 64 bits, from which a client can choose its addresses.

    - `checked_against`: the stored hash with which the password was compared, and the account's identity at that time.
      The entry is valid as long as the account has the same hash and identity.
    - `epoch`: the store's epoch when the account was last read and still had this hash and identity. The epoch is a
      number that every change of an account increases.
    - `file_version`: the version of the htpasswd file at that time.
    - `until`: when the entry expires, in seconds since 1970.
    """

    checked_against: _AccountState
    epoch: int
    file_version: str
    until: float


@dataclass(frozen=True, slots=True)
class _VerifiedPassword:
    """The entry of a right password. The cache key is a hash of the account's name and the password.

    - `checked_against`: the stored hash that the password matched, and the account's identity at that time. Each use of
      the entry compares them with the current ones.
    - `until`: when the entry expires, in seconds since 1970.
    """

    checked_against: _AccountState
    until: float


class PasswordCheck:
    """Checks passwords, for one process and its event loop. `clock` returns seconds since 1970."""

    def __init__(
        self,
        accounts: Accounts,
        hashing: HashingPool,
        throttle: LoginThrottle,
        clock: Callable[[], float],
        htpasswd: HtpasswdFile | None = None,
    ) -> None:
        self._accounts = accounts
        self._pool = hashing
        self._throttle = throttle
        self._clock = clock
        self._htpasswd = htpasswd
        # An account without a hash gets a *dummy salt*, so that its check hashes, too. The salt is computed with this
        # key. The key differs between stores, so nobody can prepare hashes that fit many stores.
        self._salt_key = hashlib.blake2b(accounts.instance_id().encode()).digest()
        self._failed_checks = SecretCache[_FailedCheck]()
        self._verified = SecretCache[_VerifiedPassword]()
        self._wrong_passwords = WrongPasswords(accounts, clock)
        self._comparisons: dict[tuple[bytes, StoredHash, Identity | None], asyncio.Task[PasswordComparison]] = {}
        """The running tasks that hash a password and compare it, by the cache key of `_verified` and the account's
        state."""
        self._rehashes: dict[str, asyncio.Task[None]] = {}
        """The running tasks that replace hashes with outdated parameters, by the old hash."""

    async def check(self, name: AccountName, password: str, address: str) -> Identity:
        """Checks the password of an account, and returns the account's identity. `address` is the client's address.
        Raises Unauthorized if the password is wrong, and TooManyRequests after too many failures or if too many logins
        wait for hashing. Raises StorageFull or StorageFailed if the store cannot count a failure.

        If the account does not exist, is disabled or has no password, every password is wrong, and the check takes as
        long as usual. A client that repeats the same wrong password causes one failure a day, over all workers. So a
        program with an old password does not lock out a person at the same address who knows the new one.

        The texts of Unauthorized are for the audit log. The caller sends the client the same text for all of them.
        """
        if len(password.encode()) > MAX_PASSWORD_BYTES:
            raise Unauthorized("the password is too long")
        key = self._failed_checks.key_of(name, password, network_of(address))
        file = await self._htpasswd.current() if self._htpasswd else EMPTY_CONTENT
        if self._was_wrong(key, name, file):
            raise Unauthorized("the password is wrong, as before")
        self._throttle.check(name, address)
        epoch = self._accounts.epoch()
        stored_hash, identity = account_state = self._account_state(name, file)
        comparison, is_first = await self._compare(name, password, account_state, site_of(address))
        if not comparison.is_right or identity is None:
            # There is no digest if the hashing has failed, or the hash in the store is malformed. Then it is not known
            # whether the password is wrong.
            if comparison.digest:
                until = self._clock() + WRONG_CACHED_SECONDS
                self._failed_checks.put(key, _FailedCheck(account_state, epoch, file.version, until))
            if await self._wrong_passwords.counts_as_failure(name, address, identity, comparison.digest):
                # Logins that share a hashing are one guess at the account. Otherwise many machines with an old password
                # would delay the logins of others for hours.
                await self._throttle.record_failure(
                    *(name, address),
                    counts_for_account=is_first,
                    counts_for_address=not self._is_line_unusable(name, file),
                )
            # The client sees neither text, so it cannot tell whether the account exists.
            raise Unauthorized("the password is wrong" if identity else "there is no such account with a password")
        await self._throttle.record_success(name, address)
        if stored_hash.argon2 is not None and needs_rehash(stored_hash.argon2):
            self._start_rehash(name, stored_hash.argon2, password)
        return identity

    def _is_line_unusable(self, name: AccountName, file: HtpasswdContent) -> bool:
        """Returns whether every password of the account `name` is refused because the htpasswd file cannot be read, or
        has only invalid lines for the name. Such a failure does not count for the client's address. Its password may be
        the right one, and the failures would delay everyone at the address. Guesses are no danger, because none of them
        succeeds. The failure still counts for the account. Otherwise the limits would reveal whether the store has an
        account of this name."""
        return self._htpasswd is not None and file.is_line_unusable(name) and not self._is_in_store(name)

    def _is_in_store(self, name: AccountName) -> bool:
        try:
            self._accounts.account(name)
        except AccountUnknown:
            return False
        return True

    async def aclose(self) -> None:
        """Cancels the hashings that have not begun, and waits until the running hashings and the replacements of
        hashes have ended."""
        await cancel_and_wait(self._comparisons.values())
        await asyncio.gather(*self._rehashes.values(), return_exceptions=True)

    def _was_wrong(self, key: bytes, name: AccountName, file: HtpasswdContent) -> bool:
        """Returns whether the cache has a failed check under `key`, and the account `name` has not changed since. Reads
        the account only if the store or the htpasswd file, whose content is `file`, has changed."""
        failed = self._failed_checks.get(key)
        if failed is None:
            return False
        if self._clock() < failed.until:
            epoch = self._accounts.epoch()
            is_unchanged = (failed.epoch, failed.file_version) == (epoch, file.version)
            if is_unchanged or failed.checked_against == self._account_state(name, file):
                failed.epoch, failed.file_version = epoch, file.version
                return True
        self._failed_checks.remove(key)
        return False

    async def _compare(
        self, name: AccountName, password: str, account_state: _AccountState, site: str
    ) -> tuple[PasswordComparison, bool]:
        """Compares the password of the account `name` with the hash in `account_state`. If another request hashes the
        same password at this moment, waits for its result. Returns the result, and whether this call has started the
        hashing. `site` is what `site_of` returns for the client's address: a wider network than that of `network_of`.
        The queue of the hashings counts logins by site. Raises TooManyRequests if too many logins wait for hashing."""
        # While the queue is full for this client, every password gets 429, even one that is remembered or is being
        # hashed. Otherwise a client could fill the queue and then guess at no cost. A wrong password would get 429 and
        # would not be counted, and the remembered right one would be accepted.
        self._pool.check_queue(site)
        key = self._verified.key_of(name, password)
        verified = self._verified.get(key)
        if verified is not None:
            if verified.checked_against == account_state and self._clock() < verified.until:
                return PasswordComparison(True), False
            self._verified.remove(key)
        is_first = (key, *account_state) not in self._comparisons
        comparison = await wait_for_outcome(self._comparison_task(key, password, account_state, site))
        if comparison.is_right:
            self._verified.put(key, _VerifiedPassword(account_state, self._clock() + VERIFIED_SECONDS))
        return comparison, is_first

    def _comparison_task(
        self, key: bytes, password: str, account_state: _AccountState, site: str
    ) -> asyncio.Task[PasswordComparison]:
        """Returns the task that compares the password with the hash in `account_state`. Starts the task if it does
        not run yet. `key` is the cache key of `_verified`."""
        # A login that begins after a change of the account has another `account_state`, so it does not get an older
        # result.
        task_key = (key, *account_state)
        task = self._comparisons.get(task_key)
        if task is None:
            work = partial(compare_password, password, account_state[0])
            task = self._comparisons[task_key] = self._pool.start(work, site)
            task.add_done_callback(lambda _: self._comparisons.pop(task_key, None))
        return task

    def _account_state(self, name: AccountName, file: HtpasswdContent) -> _AccountState:
        """Returns the hash of an account's password, and the account's identity. `file` is the content of the htpasswd
        file."""
        dummy_salt = hashlib.blake2b(name.encode(), digest_size=SALT_BYTES, key=self._salt_key).digest()
        # `compare_password` needs the highest bcrypt cost for every account. With it, the check of a wrong password
        # takes the same time for all accounts, including accounts that do not exist. No password matches `no_hash`.
        no_hash = StoredHash(highest_bcrypt_cost=file.highest_bcrypt_cost, dummy_salt=dummy_salt)
        try:
            account = self._accounts.account(name)
        except AccountUnknown:
            line = file.lines.get(name)
            if line is None:
                return no_hash, None
            # When the line changes, its stamp (a hash of the line) changes, and an identity with the old stamp is
            # refused.
            identity = Identity(name, stamp=line.stamp)
            return replace(no_hash, bcrypt=line.hash), identity
        argon2 = self._accounts.password_hash(name)
        if argon2 is None or not account.enabled:
            return no_hash, None
        identity = Identity(name, robot=account.kind is AccountKind.ROBOT, version=account.version)
        return replace(no_hash, argon2=argon2), identity

    def _start_rehash(self, name: AccountName, old_hash: str, password: str) -> None:
        """Starts a task that replaces the stored hash `old_hash` of an account by a hash with the current parameters.
        `password` is the account's password. Does nothing if such a task runs."""
        if old_hash not in self._rehashes:
            task = self._rehashes[old_hash] = start_detached(self._rehash(name, old_hash, password))
            task.add_done_callback(lambda _: self._rehashes.pop(old_hash, None))

    async def _rehash(self, name: AccountName, old_hash: str, password: str) -> None:
        try:
            new_hash = await self._pool.run(partial(hash_password, password))
            await self._accounts.replace_hash(name, old_hash, new_hash)
        except RegistryError as error:
            log.warning("could not renew the password hash of %s, which has old parameters: %s", name, error)
