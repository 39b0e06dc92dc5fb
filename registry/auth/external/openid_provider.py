"""Requests to the OpenID provider.

For a login, `OpenIDProvider` fetches the provider's metadata (its URLs) and its public keys, and exchanges an
authorization code for an ID token. No request is sent before the first login. `registry.auth.external.openid_protocol`
creates the content of the requests and parses the responses, with Authlib. This module sends the requests, and limits
their size, time and number (`registry.auth.external.identity_http`, `registry.auth.external.fetched_document`).
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
"""If the cached metadata of the provider has at least this age, the next login fetches the metadata again."""
METADATA_STALE_SECONDS: Final = 86400.0
"""If the metadata cannot be fetched again, a login uses the cached metadata up to this age."""
METADATA_RETRY_SECONDS: Final = 10.0
"""The shortest time from the end of a fetch of the metadata to the start of the next fetch."""


class OpenIDProvider:
    """Sends requests to the OpenID provider, for one process and its event loop. The constructor sends none. `settings`
    must name an issuer. `monotonic` returns monotonic seconds."""

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
        """The provider's key set, by its URL. When the metadata names another URL, the key set at the new URL replaces
        the old key set."""

    async def metadata(self) -> ProviderMetadata:
        """Returns the provider's metadata. If the cached metadata is not fresh, first fetches it again and waits for
        the fetch. Concurrent callers share one fetch, and it continues if a caller is cancelled. For
        `METADATA_RETRY_SECONDS` after the end of a fetch, no other fetch starts. Raises ProviderUnavailable if the
        cache has no metadata, or only metadata that is too old (`METADATA_STALE_SECONDS`)."""
        if not self._metadata.is_fresh:
            await self._metadata.refresh()
        metadata = self._metadata.current
        if metadata is None:
            raise ProviderUnavailable("its metadata is not available")
        return metadata

    async def keys(self) -> FetchedKeySet:
        """Returns the provider's key set, whose URL is in the metadata. Raises ProviderUnavailable if there is no
        metadata. Does not fetch the keys; `FetchedKeySet.find` does."""
        url = (await self.metadata()).keys_url
        if url not in self._key_sets:
            for outdated in self._key_sets.values():
                await outdated.aclose()
            fetch = partial(fetch_key_set, ca_file=self._settings.ca_file)
            self._key_sets = {url: FetchedKeySet(url, fetch, self._clock)}
        return self._key_sets[url]

    async def login_url(self, attempt: LoginAttempt) -> str:
        """Returns the URL of the provider's login page for an attempt. Raises ProviderUnavailable if there is no
        metadata."""
        return self._protocol.login_url(
            await self.metadata(),
            client_id=self.client_id,
            redirect_uri=attempt.redirect_uri,
            scope=self._settings.scopes,
            state=attempt.state,
            nonce=attempt.nonce,
            verifier=attempt.verifier,
        )

    async def redeem(self, code: str, verifier: str, redirect_uri: str) -> str:
        """Exchanges an authorization code for an ID token, and returns the token, which the caller must verify.

        `verifier` is the secret whose hash was sent at the start of the login (PKCE, RFC 7636). `redirect_uri` is the
        URL of this registry that was sent at the start of the login. Raises ProviderUnavailable, CodeRefused.
        """
        metadata = await self.metadata()
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
        """Verifies the ID token `text` and returns its claims. `nonce` is the random value that was sent at the start
        of the login, `now` is in seconds since 1970. Raises IDTokenInvalid, ProviderUnavailable."""
        return await self._protocol.verify_id_token(
            text, await self.keys(), issuer=self.issuer, client_id=self.client_id, nonce=nonce, now=now
        )

    async def aclose(self) -> None:
        """Cancels running fetches of the metadata and the key set, and waits until they have ended."""
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
