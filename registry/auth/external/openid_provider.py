"""Requests to the OpenID provider.

For a login, `OpenIDProvider` fetches the provider's metadata (its URLs) and its public keys, and exchanges an
authorization code for an ID token. `OpenIDProvider` sends no request before the first login.

`registry.auth.external.openid_protocol` creates the content of the requests, and parses the responses.
`registry.auth.external.identity_http` limits the size and the time of a request.
`registry.auth.external.fetched_document` limits how often the metadata and the keys are fetched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from registry.auth.external.fetched_document import FetchedDocument, FetchTimes
from registry.auth.external.identity_http import NoUsableResponse, send_request
from registry.auth.external.jwks import FetchedKeySet, fetch_key_set
from registry.auth.external.login_attempts import LoginAttempt
from registry.auth.external.openid_settings import ProviderInvalid, ProviderUnavailable, read_client_secret
from registry.config.auth_settings import OIDCSettings

if TYPE_CHECKING:
    from registry.auth.external.openid_protocol import ProviderMetadata

log = logging.getLogger(__name__)

METADATA_FRESH_SECONDS: Final = 3600.0
"""If the cached metadata has at least this age, a login fetches the metadata again."""
METADATA_STALE_SECONDS: Final = 86400.0
"""Largest age of cached metadata that a login uses if the metadata cannot be fetched again."""
METADATA_RETRY_SECONDS: Final = 10.0
"""The shortest time from the end of a fetch of the metadata to the start of the next fetch, whether or not the
earlier fetch succeeded."""


class OpenIDProvider:
    """Sends requests to the OpenID provider, for one process and its event loop. The constructor sends no request.
    `settings` must name an issuer. `monotonic` returns monotonic seconds."""

    def __init__(self, settings: OIDCSettings, monotonic: Callable[[], float]) -> None:
        from registry.auth.external import openid_protocol  # imports Authlib, which only logins at a provider need

        assert settings.issuer is not None
        self._protocol = openid_protocol
        self.issuer = settings.issuer
        self.client_id = settings.client_id or ""
        self._settings = settings
        self._clock = monotonic
        times = FetchTimes(
            refresh_age=METADATA_FRESH_SECONDS,
            max_age=METADATA_STALE_SECONDS,
            pause_after_failure=METADATA_RETRY_SECONDS,
            pause_after_success=METADATA_RETRY_SECONDS,
        )
        self._metadata = FetchedDocument(self._fetch_metadata, times, monotonic)
        self._key_sets: dict[str, FetchedKeySet] = {}
        """Maps the URL of the provider's key set to the key set. The provider has only one key set, so this dict has at
        most one entry. Before the first successful call of `get_key_set`, it is empty. When the URL in the metadata
        changes, the next call replaces the old key set by the key set at the new URL."""

    async def get_metadata(self) -> ProviderMetadata:
        """Returns the provider's metadata. First fetches the metadata if both conditions are true:

        - The cache has no metadata, or the cached metadata has at least the age `METADATA_FRESH_SECONDS`.
        - At least `METADATA_RETRY_SECONDS` have passed since the end of the last fetch, or there was no fetch.

        Concurrent callers share one fetch. The fetch continues if a caller is cancelled. Raises ProviderUnavailable if
        the cache then has no metadata, or only metadata older than `METADATA_STALE_SECONDS`."""
        if not self._metadata.is_fresh:
            await self._metadata.refresh()
        metadata = self._metadata.current
        if metadata is None:
            raise ProviderUnavailable("its metadata is not available")
        return metadata

    async def get_key_set(self) -> FetchedKeySet:
        """Returns the provider's key set, whose URL is in the metadata. Does not fetch the keys: `FetchedKeySet.find`
        does. Raises ProviderUnavailable if the metadata is not available."""
        url = (await self.get_metadata()).keys_url
        if url not in self._key_sets:
            for outdated in self._key_sets.values():
                await outdated.aclose()
            fetch = partial(fetch_key_set, ca_file=self._settings.ca_file)
            self._key_sets = {url: FetchedKeySet(url, fetch, self._clock)}
        return self._key_sets[url]

    async def authorization_url(self, attempt: LoginAttempt) -> str:
        """Returns the URL of the provider's login page for a login attempt. Raises ProviderUnavailable if the metadata
        is not available."""
        return self._protocol.authorization_url(
            await self.get_metadata(),
            client_id=self.client_id,
            redirect_uri=attempt.redirect_uri,
            scope=self._settings.scopes,
            state=attempt.state,
            nonce=attempt.nonce,
            verifier=attempt.verifier,
        )

    async def redeem(self, code: str, verifier: str, redirect_uri: str) -> str:
        """Exchanges an authorization code for an ID token, and returns the token, which the caller must verify.

        - `verifier`: the secret whose hash the authorization URL contained (PKCE, RFC 7636).
        - `redirect_uri`: the URL of this registry that the authorization URL contained.

        Raises CodeRefused if the provider refuses the code or the client authentication of this registry. Raises
        ProviderUnavailable if the request cannot be sent or gets no usable response."""
        metadata = await self.get_metadata()
        form, headers = self._protocol.token_request(
            metadata,
            client_id=self.client_id,
            secret=self._secret(),
            code=code,
            verifier=verifier,
            redirect_uri=redirect_uri,
        )
        try:
            status, body = await send_request(metadata.token_url, self._settings.ca_file, form=form, headers=headers)
        except NoUsableResponse as error:
            raise ProviderUnavailable(str(error)) from None
        return self._protocol.parse_token_response(status, body)

    async def verify(self, text: str, *, nonce: str, now: float) -> Mapping[str, Any]:
        """Verifies the ID token `text` and returns its claims. `nonce` is the random value that the authorization URL
        contained. `now` is in seconds since 1970. Raises IDTokenInvalid if the token is not valid, and
        ProviderUnavailable if the metadata or the keys are not available."""
        return await self._protocol.verify_id_token(
            text, await self.get_key_set(), issuer=self.issuer, client_id=self.client_id, nonce=nonce, now=now
        )

    async def aclose(self) -> None:
        """Cancels running fetches of the metadata and of the key set, and waits until these fetches have ended."""
        await self._metadata.aclose()
        for key_set in self._key_sets.values():
            await key_set.aclose()

    def _secret(self) -> str | None:
        """Returns the client secret, or None if the settings have none. Raises ProviderUnavailable if the secret cannot
        be read or is empty."""
        try:
            return read_client_secret(self._settings)
        except ProviderInvalid as error:
            raise ProviderUnavailable(str(error)) from None

    async def _fetch_metadata(self) -> ProviderMetadata | None:
        """Fetches the metadata and returns it. After a failure, logs a warning and returns None."""
        try:
            status, body = await send_request(self._protocol.metadata_url(self.issuer), self._settings.ca_file)
            if status != 200:
                raise NoUsableResponse(f"the response has the status {status}")
            return self._protocol.parse_metadata(body, self.issuer)
        except (NoUsableResponse, ProviderUnavailable) as error:
            log.warning("could not fetch the metadata of the OpenID provider %s: %s", self.issuer, error)
            return None
