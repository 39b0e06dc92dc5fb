"""Who calls the management API: by Basic (a password, or an API token in its place), by an API token as Bearer, or in
the session of a login at the OpenID provider."""

from __future__ import annotations

from collections.abc import Sequence

from registry.auth import api_tokens, authorization
from registry.auth.authorization import REFUSED, Basic, Bearer
from registry.auth.credentials import Credentials
from registry.auth.policy import Policy
from registry.auth.principal import Principal
from registry.auth.proof import NOBODY, Proof
from registry.auth.sessions import ENDED, Sessions
from registry.http.exchange import Header
from storage.content import Actor
from storage.errors import Unauthorized


class ManagementAuthenticator:
    """An `Authenticator`. While there are no accounts, the header is not looked at: everybody is nobody."""

    def __init__(self, policy: Policy, credentials: Credentials, sessions: Sessions) -> None:
        self._policy = policy
        self._credentials = credentials
        self._sessions = sessions

    async def authenticate(self, headers: Sequence[Header], by: Actor, session: str | None = None) -> Principal:
        if not self._policy.closed:
            return self._policy.nobody()
        match authorization.read([value for name, value in headers if name == b"authorization"]):
            case Basic(user, secret):
                return await self._principal(await self._credentials.verify_basic(user, secret, by))
            case Bearer(token) if api_tokens.looks_like_one(token):
                return await self._api_token(token, by)
            case Bearer(token):
                return await self._principal(await self._credentials.verify_bearer(token, by))
        return await (self._principal(NOBODY) if session is None else self._in_session(session))

    async def _principal(self, proof: Proof) -> Principal:
        await self._policy.prepare(proof)
        return self._policy.principal(proof)

    async def _in_session(self, text: str) -> Principal:
        try:
            return await self._principal(self._sessions.verify(text))
        except Unauthorized:
            raise Unauthorized(ENDED) from None

    async def _api_token(self, text: str, by: Actor) -> Principal:
        """One that a client was given at its login is for `/token` alone."""
        proof = await self._credentials.verify_refresh(text, by)
        token = api_tokens.find(self._policy.accounts, text)
        if token.purpose != "personal":
            raise Unauthorized(REFUSED)
        return await self._principal(proof)
