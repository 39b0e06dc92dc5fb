"""From a request's headers to the principal who acts in it.

The hot path is one look: what an `Authorization` header proved is remembered by keyed hash, together with the principal
it made and the accounts' `epoch` that was read for it. Every request reads the epoch; under another one the credentials
are asked again, and the principal is made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Final

from registry.auth.authorization import Bearer, read
from registry.auth.credentials import Credentials
from registry.auth.guard import Guarded
from registry.auth.policy import Policy
from registry.auth.principal import ASKED, NO_ONE, PRINCIPAL, Principal, open_principal
from registry.auth.proof import NOBODY, Proof
from registry.http.exchange import Exchange
from storage.errors import Unauthorized
from storage.names import RepositoryName

INVALID: Final = "invalid_token"
_MOST: Final = 1024
"""Headers that are remembered in a process."""
_AGAIN: Final = 600.0
"""Seconds after which the credentials are asked again in any case."""


class Remembered:
    """What a header proved. Counts until `until` (seconds since 1970). `foreign`: it rests on something that is not in
    the store as well, so no epoch tells of its end."""

    __slots__ = ("epoch", "foreign", "principal", "until")

    def __init__(self, principal: Principal, epoch: int, until: float) -> None:
        self.principal = principal
        self.epoch = epoch
        self.until = until if principal.expires is None else min(until, principal.expires)
        self.foreign = principal.proof.stamp is not None


class HeaderAuthenticator:
    """An `Authenticator` by the `Authorization` header. While there are no accounts, the header is not looked at: some
    clients send here what they log in with elsewhere."""

    def __init__(
        self,
        guard: Guarded,
        policy: Policy,
        credentials: Credentials,
        *,
        clock: Callable[[], float],
        key: bytes,
    ) -> None:
        """`clock`: seconds since 1970. `key`: 16 to 64 random bytes of this process's own."""
        self._guard = guard
        self._policy = policy
        self._credentials = credentials
        self._epoch_now = policy.accounts.epoch
        self._clock = clock
        self._marking = blake2b(digest_size=16, key=key)  # copying it costs half of what making one does
        self._begun, self._last_address = self._marking, ""  # most requests come from where the one before came from
        self._remembered: dict[bytes, Remembered] = {}
        self._epoch: int | None = None
        self._nobody = NO_ONE

    async def authenticate(self, exchange: Exchange) -> None:
        epoch = self._epoch_now()
        if epoch != self._epoch:
            await self._policy.prepare(NOBODY)
            epoch = self._epoch_now()
            self._nobody, self._epoch = self._policy.nobody(), epoch
        principal = self._nobody
        if not principal.open:
            shown = exchange.headers(b"authorization")
            if shown:
                mark = self._mark(shown[0], exchange.address)
                found = self._remembered.get(mark)
                if found is None or not self._counts(found) or len(shown) > 1:
                    found = await self._look(shown, mark, exchange)
                principal = found.principal
        PRINCIPAL.set(principal)
        ASKED.set(exchange.asked)
        exchange.name = principal.name
        exchange.let_in = principal.let_in

    def known(self, shown: Sequence[bytes], address: str) -> bytes | None:
        """What `authenticate` found out last, if it still counts and there is no more to it than the store holds."""
        if self._nobody.open or not shown:
            return b""
        mark = self._mark(shown[0], address)
        found = self._remembered.get(mark)
        return None if found is None or not self._counts(found) or len(shown) > 1 else mark

    def check_push(self, repo: RepositoryName) -> None:
        self._guard.check_push(repo)

    def _mark(self, shown: bytes, address: str) -> bytes:
        """What others have shown right is not to be guessed from here, so the address counts as well."""
        if address != self._last_address:
            begun = self._marking.copy()
            begun.update(address.encode() + b"\0")  # no address holds a NUL, so the two are apart
            self._last_address, self._begun = address, begun
        marking = self._begun.copy()
        marking.update(shown)
        return marking.digest()

    def _counts(self, found: Remembered) -> bool:
        return found.epoch == self._epoch and found.until > self._clock() and not found.foreign

    async def _look(self, shown: list[bytes], mark: bytes, exchange: Exchange) -> Remembered:
        """What the header proves now. Raises Unauthorized, TooManyRequests."""
        self._remembered.pop(mark, None)
        proof = await self._verify(shown, exchange)
        await self._policy.prepare(proof)
        epoch = self._epoch_now()  # before the rights: what changes between the two is seen the next time
        found = Remembered(self._policy.principal(proof), epoch, self._clock() + _AGAIN)
        if len(self._remembered) >= _MOST:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[mark] = found
        return found

    async def _verify(self, shown: list[bytes], exchange: Exchange) -> Proof:
        credential = read(shown)
        if credential is None:
            return NOBODY
        if not isinstance(credential, Bearer):
            return await self._credentials.verify_basic(credential.user, credential.secret, exchange.actor)
        try:
            return await self._credentials.verify_bearer(credential.token, exchange.actor)
        except Unauthorized as error:
            raise Unauthorized(error.message, reason=INVALID) from None


class OpenAuthenticator:
    """An `Authenticator` for a registry that keeps no accounts: everybody may do everything, but pull below `guarded`
    first segments."""

    def __init__(self, guard: Guarded, guarded: Iterable[str] = ()) -> None:
        self._guard = guard
        self._principal = open_principal(guarded)

    def known(self, shown: Sequence[bytes], address: str) -> bytes:
        return b""

    def check_push(self, repo: RepositoryName) -> None:
        self._guard.check_push(repo)

    async def authenticate(self, exchange: Exchange) -> None:
        PRINCIPAL.set(self._principal)
        ASKED.set(exchange.asked)
