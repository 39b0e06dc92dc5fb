"""A fake of an external issuer whose tokens the registry trusts: signing keys, a key set, and a server for the key
set."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from joserfc.jwk import ECKey, Key, RSAKey
from joserfc.jws import JWSRegistry

ISSUER = "https://ci.example.com"
AUDIENCE = "registry.example.com"


def signed_token(header: Mapping[str, Any], claims: Mapping[str, Any], key: Key | None = None) -> str:
    """Returns a token (JWT) with this header and these claims, even if they are invalid. `alg` in the header names the
    algorithm of the signature."""
    text = ".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
    return f"{text}.{_base64url(JWSRegistry.algorithms[header['alg']].sign(text.encode(), key))}"


def claims_of(text: str) -> dict[str, Any]:
    """Returns the claims of a token. Does not check the signature."""
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text.split(".")[1] + "=="))
    return found


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


class IssuerKey:
    """A key pair with an id."""

    def __init__(self, key_id: str, algorithm: str = "ES256", bits: int = 2048) -> None:
        self.id = key_id
        self.algorithm = algorithm
        self.private: Any
        if algorithm.startswith("ES"):
            self.private = ec.generate_private_key(ec.SECP256R1())
        else:
            self.private = rsa.generate_private_key(65537, bits)

    def jwk(self, **more: Any) -> dict[str, Any]:
        """Returns the public part as an entry of a key set."""
        public = self.private.public_key()
        key = ECKey(public, public) if self.algorithm.startswith("ES") else RSAKey(public, public)
        return {**key.as_dict(), "kid": self.id, **more}

    def sign(self, claims: dict[str, Any], **header: Any) -> str:
        """Returns a signed token. `header`: changes to the header; `kid=None` leaves out the id of the key."""
        fields = {"alg": self.algorithm, "typ": "JWT", "kid": self.id, **header}
        header_fields = {name: value for name, value in fields.items() if value is not None}
        key = ECKey if self.algorithm.startswith("ES") else RSAKey
        return signed_token(header_fields, claims, key(self.private, self.private))


def key_set(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": keys}).encode()


class KeySetServer:
    """Serves a key set over HTTP. `extra`: further header lines of each response. `request_count`: the number of
    requests. While the event `open` is clear, requests wait. `waiting` is set when a request arrives."""

    def __init__(self) -> None:
        self.body = key_set()
        self.status = 200
        self.extra = ""
        self.request_count = 0
        self.url = ""
        self.open = asyncio.Event()
        self.open.set()
        self.waiting = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            self.request_count += 1
            self.waiting.set()
            await self.open.wait()
            fields = f"content-length: {len(self.body)}\r\nconnection: close\r\n{self.extra}"
            writer.write(f"HTTP/1.1 {self.status} Said\r\n{fields}\r\n".encode() + self.body)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def key_set_server() -> AsyncIterator[KeySetServer]:
    key_server = KeySetServer()
    server = await asyncio.start_server(key_server.serve, "127.0.0.1", 0)
    key_server.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/keys"
    async with server:
        yield key_server
        key_server.open.set()
