"""Sends one event to one webhook (`WebhookClient`). The *endpoint* is the URL of the webhook."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import re
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Final

import httpx2

from registry import __version__
from registry.config.event_settings import Webhook
from registry.events.attempts import AttemptResult, DeliveryOutcome
from registry.events.envelopes import EVENT_FORMATTERS
from registry.response_limits import PIECES_PER_PAUSE, NoCookies
from registry.small_files import read_small_text
from registry.upstream.api_transport import CheckedTransport
from registry.upstream.destinations import ANYWHERE, AddressPolicy, NetworkClass, Reach
from registry.upstream.transport import Resolver, TrustStore
from storage.errors import RegistryError, UpstreamUnavailable
from storage.outbox import Event

_DOWN_STATUSES: Final = frozenset({408, 425, 429, 502, 503, 504})
"""Statuses which mean that the endpoint, or a service that it needs, is not available now."""
MAX_READ_BYTES: Final = 64 * 1024
"""Longest body of a response that is read. If the body is longer, the connection is closed and not used again."""
MAX_READ_SECONDS: Final = 1.0
"""Longest time for reading the body of a response. If reading takes longer, the connection is closed."""
_CONNECTION_LOST_ERRORS: Final = (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError, httpx2.CloseError)
"""Errors that can mean that the endpoint has closed an idle connection. After such an error, `send` sends
the event once more."""
_TOKEN: Final = re.compile(r"[\x21-\x7e]+")
"""A token that can be sent in a header: visible ASCII characters."""
MAX_ERROR_CHARACTERS: Final = 300
"""Longest text of an error in `AttemptResult.reason`. A longer text is cut off."""
log = logging.getLogger("registry.events")


class _WebhookPolicy(AddressPolicy):
    """Checks the addresses of a webhook. Its error for a refused address names the setting that allows the address."""

    def _refusal(self, host: str, port: int, address: str, network: NetworkClass) -> UpstreamUnavailable:
        return UpstreamUnavailable(
            f"{host} has the address {address}, which is {network.value}; to allow it, set private_network = true"
        )


class WebhookClient:
    """Sends events to one webhook. Keeps the connections open for later events. Never follows a redirect, because the
    redirect could lead to a host that the settings do not name. Uses no proxy. Used from one event loop."""

    def __init__(self, settings: Webhook, registry_url: str) -> None:
        """`registry_url`: the registry's URL, which the events name as their source."""
        self._settings = settings
        self._registry_url = registry_url
        self._format_event = EVENT_FORMATTERS[settings.format]
        self._reach = ANYWHERE if settings.private_network else Reach(NetworkClass.PUBLIC)
        """The addresses to which a request may connect: any, or only public ones."""
        self._resolver = Resolver(settings.name)
        self._client: httpx2.AsyncClient | None = None
        self._client_lock = asyncio.Lock()  # held while `_get_client` makes the client

    async def send(self, event: Event) -> AttemptResult:
        """Sends an event and returns how the attempt ended. The result depends only on the status of the response, not
        on its body. If there is no response, the outcome is `DeliveryOutcome.DOWN`. The setting `timeout` limits the
        time until the response begins. A cancellation closes the connection; the endpoint may or may not
        have got the event."""
        media_type, body = self._format_event(event, self._registry_url)
        try:
            headers = {"content-type": media_type, **self._signature_headers(body), **self._authorization_headers()}
            client = await self._get_client()
            async with asyncio.timeout(self._settings.timeout):
                try:
                    response = await self._post(client, body, headers)
                except _CONNECTION_LOST_ERRORS:
                    response = await self._post(client, body, headers)
            await _read_body(response)
            return _result_of(response.status_code)
        except TimeoutError:
            return AttemptResult(DeliveryOutcome.DOWN, f"it did not answer within {self._settings.timeout:g} s")
        except RegistryError as error:
            return AttemptResult(DeliveryOutcome.DOWN, error.message)
        except httpx2.LocalProtocolError:  # its text may contain the value of a header, such as a token
            return AttemptResult(
                DeliveryOutcome.DOWN, "the request breaks the rules of HTTP, so it was not sent; check the settings"
            )
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            return AttemptResult(DeliveryOutcome.DOWN, _shortened(f"{type(error).__name__}: {error}"))

    async def _post(self, client: httpx2.AsyncClient, body: bytes, headers: dict[str, str]) -> httpx2.Response:
        """Sends the POST request once, and returns the response before its body has arrived. The caller must close the
        response. Raises the errors of httpx2."""
        request = client.build_request("POST", self._settings.url, content=body, headers=headers)
        return await client.send(request, stream=True)

    async def _get_client(self) -> httpx2.AsyncClient:
        """Returns the HTTP client. The first call makes the client. Raises ValueError if `ca_file` cannot be read."""
        async with self._client_lock:
            if self._client is None:
                self._client = self._make_client(await asyncio.to_thread(_make_context, self._settings.ca_file))
            return self._client

    def _make_client(self, context: ssl.SSLContext) -> httpx2.AsyncClient:
        """Returns a new HTTP client. The client checks the endpoint's certificate with `context`."""
        limits = httpx2.Limits(max_connections=self._settings.connections)
        policy = _WebhookPolicy(self._settings.name)
        return httpx2.AsyncClient(
            transport=CheckedTransport(policy, self._reach, self._resolver, context, limits),
            timeout=None,  # `send` and `_read_body` limit the time
            follow_redirects=False,
            trust_env=False,
            cookies=NoCookies(),
            headers={"user-agent": f"entrepot/{__version__}"},
        )

    def _signature_headers(self, body: bytes) -> dict[str, str]:
        """Returns the header that signs the body. Returns no header if the webhook has no secret. Reads the secret at
        each call, so that a new secret is used immediately. Raises OSError or ValueError if the secret cannot be
        read."""
        settings = self._settings
        if settings.secret_file is not None:
            secret = _read_secret(settings.secret_file)
        elif settings.secret_env is not None:
            secret = os.environ.get(settings.secret_env, "")
            if not secret:
                raise ValueError(f"the environment variable {settings.secret_env} is not set")
        else:
            return {}
        return {settings.signature_header: f"sha256={sign(secret, body)}"}

    def _authorization_headers(self) -> dict[str, str]:
        """Returns the header with the token. Returns no header if the webhook has no token. Raises OSError or
        ValueError if the token cannot be read or cannot be sent in a header. The text of the error does not contain the
        token."""
        file = self._settings.token_file
        if file is None:
            return {}
        token = _read_secret(file).strip()
        if not _TOKEN.fullmatch(token):
            raise ValueError(f"{file} is not one line of visible ASCII")
        return {"authorization": f"Bearer {token}"}

    async def aclose(self) -> None:
        """Closes the connections. May be called more than once."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()
        await self._resolver.aclose()


async def _read_body(response: httpx2.Response) -> None:
    """Reads the body of a response, so that the connection can be used again. Closes the connection if the body is
    longer than `MAX_READ_BYTES`, takes longer than `MAX_READ_SECONDS`, or breaks off."""
    read = pieces = 0
    try:
        with suppress(TimeoutError, httpx2.HTTPError, RegistryError, OSError):
            async with asyncio.timeout(MAX_READ_SECONDS):
                async for piece in response.aiter_raw():
                    read += len(piece)
                    pieces += 1
                    if read > MAX_READ_BYTES:
                        break
                    if pieces % PIECES_PER_PAUSE == 0:
                        await asyncio.sleep(0)
    finally:
        await response.aclose()


def _result_of(status: int) -> AttemptResult:
    """Returns the result of an attempt that the endpoint answered with `status`."""
    if 200 <= status < 300:
        return AttemptResult(DeliveryOutcome.DELIVERED)
    reason = f"it answered {status}"
    if 300 <= status < 400:
        reason += ", a redirect, which is not followed; set `url` to where the redirect leads"
    return AttemptResult(DeliveryOutcome.DOWN if status in _DOWN_STATUSES else DeliveryOutcome.REFUSED, reason)


def _make_context(ca_file: Path | None) -> ssl.SSLContext:
    """Returns the TLS context that checks certificates. `ca_file`: the file with the certificate authorities to trust;
    None: the system's authorities are trusted. Blocks for about 30 ms. Raises ValueError if `ca_file` cannot be
    read."""
    if ca_file is None:
        return TrustStore(None).context()
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except OSError as error:  # also ssl.SSLError, which is a subclass
        raise ValueError(f"its ca_file {ca_file} cannot be read: {error}") from None


def sign(secret: str, body: bytes) -> str:
    """Returns the signature of a body: its HMAC-SHA256 in hexadecimal."""
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def _read_secret(file: Path) -> str:
    """Returns the content of a file without the line end. Raises OSError if the file cannot be read, and ValueError if
    it is empty or not UTF-8."""
    try:
        text = read_small_text(file).rstrip("\r\n")
    except UnicodeDecodeError:  # the text of this error shows a byte of the file
        raise ValueError(f"{file} is not UTF-8") from None
    if not text:
        raise ValueError(f"{file} is empty")
    return text


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_ERROR_CHARACTERS else text[:MAX_ERROR_CHARACTERS] + "…"
