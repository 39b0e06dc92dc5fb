"""The keys of trusted issuers: when they are fetched or read from a file, and what happens while they cannot be."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from registry.auth.external import identity_http, jwks
from registry.auth.external.jwks import MAX_AGE_SECONDS, PAUSE_SECONDS, REFRESH_AGE_SECONDS, RETRY_SECONDS
from storage.errors import Unauthorized
from tests.fakes.auth_worker import CI, KNOWN_ADDRESS, AuthClock, AuthWorker
from tests.fakes.issuer_worker import check_refused, claims, worker_that_trusts
from tests.fakes.token_issuer import IssuerKey, KeySetServer, key_set


async def check_new_key_is_fetched(
    worker: AuthWorker, key_server: KeySetServer, old_key: IssuerKey, new_key: IssuerKey, **header: Any
) -> None:
    """Replaces the issuer's key. Checks that the key set is fetched again for a token with the new key, at most once a
    minute, and that the old key is not accepted after that. `header`: fields for the headers of the tokens."""
    verify = worker.access.credential_verifier.verify_bearer
    assert await verify(old_key.sign(claims(worker.clock), **header), KNOWN_ADDRESS)
    key_server.body = key_set(new_key.jwk())
    text = new_key.sign(claims(worker.clock), **header)
    for _ in range(3):
        with pytest.raises(Unauthorized):
            await verify(text, KNOWN_ADDRESS)
    assert key_server.request_count == 1
    worker.clock.now += PAUSE_SECONDS
    assert await verify(text, KNOWN_ADDRESS)
    assert key_server.request_count == 2
    await check_refused(worker, old_key.sign(claims(worker.clock), **header))


async def test_a_new_key_is_fetched(
    trusting_worker: AuthWorker, key_server: KeySetServer, key: IssuerKey, other_key: IssuerKey
) -> None:
    """An unknown key id makes the registry fetch the key set again, at most once a minute."""
    await check_new_key_is_fetched(trusting_worker, key_server, key, other_key)


@pytest.mark.parametrize("key_id", ["one", None])
async def test_a_key_that_replaces_another_under_its_id_is_fetched(
    trusting_worker: AuthWorker, key_server: KeySetServer, key: IssuerKey, key_id: str | None
) -> None:
    """If an issuer replaces its key by one with the same id, or its tokens name no key, a wrong signature makes the
    registry fetch the key set again, at most once a minute. Then the new key is accepted, and the old one is not."""
    await check_new_key_is_fetched(trusting_worker, key_server, key, IssuerKey("one"), kid=key_id)


async def test_known_keys_are_used_during_a_fetch(
    trusting_worker: AuthWorker, key_server: KeySetServer, key: IssuerKey, other_key: IssuerKey
) -> None:
    """During a fetch of keys, tokens with known keys are checked without a wait. All other tokens wait for one shared
    fetch. It continues if one of the waiting callers is cancelled."""
    verify = trusting_worker.access.credential_verifier.verify_bearer
    assert await verify(key.sign(claims(trusting_worker.clock)), KNOWN_ADDRESS)
    trusting_worker.clock.now += PAUSE_SECONDS
    key_server.body = key_set(key.jwk(), other_key.jwk())
    key_server.open.clear()
    key_server.waiting.clear()
    waiting = [
        asyncio.create_task(verify(other_key.sign(claims(trusting_worker.clock, n=n)), KNOWN_ADDRESS)) for n in range(5)
    ]
    await key_server.waiting.wait()
    assert await verify(key.sign(claims(trusting_worker.clock, n=6)), KNOWN_ADDRESS)
    waiting[0].cancel()
    await asyncio.gather(waiting[0], return_exceptions=True)
    assert not any(task.done() for task in waiting[1:])
    key_server.open.set()
    assert {proof.name for proof in await asyncio.gather(*waiting[1:])} == {CI}
    assert key_server.request_count == 2


KEY_SERVER_FAULTS: dict[str, dict[str, Any]] = {
    "an error": {"status": 500},
    "elsewhere": {"status": 302, "extra": "location: http://127.0.0.1:1/\r\n"},
    "no JSON": {"body": b"<html>"},
    "no set": {"body": b'{"keys": 7}'},
    "a list": {"body": b"[]"},
    "too large": {"body": b"x" * (identity_http.MAX_RESPONSE_BYTES + 1)},
    "no keys": {"body": key_set()},
    "nonsense": {"body": b'{"keys": [7, null, {}, {"kty": "EC"}, {"kty": "RSA", "n": "!", "e": 1}, {"kty": "x"}]}'},
}
"""For each fault, the attributes of the key server that produce the fault."""


@pytest.mark.parametrize("name", KEY_SERVER_FAULTS)
@pytest.mark.slow
async def test_tokens_are_refused_while_keys_cannot_be_fetched(
    trusting_worker: AuthWorker, key_server: KeySetServer, key: IssuerKey, name: str
) -> None:
    """Without keys, every token is refused. The fetch is repeated after a pause, and then tokens are accepted."""
    good = key_server.body
    for field, value in KEY_SERVER_FAULTS[name].items():
        setattr(key_server, field, value)
    text = key.sign(claims(trusting_worker.clock))
    await check_refused(trusting_worker, text)
    assert key_server.request_count == 1
    key_server.body, key_server.status, key_server.extra = good, 200, ""
    trusting_worker.clock.now += PAUSE_SECONDS if name in ("no keys", "nonsense") else RETRY_SECONDS
    assert await trusting_worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)


async def test_known_keys_are_used_while_the_issuer_is_unavailable(
    trusting_worker: AuthWorker, key_server: KeySetServer, key: IssuerKey
) -> None:
    """Known keys are fetched again after an hour, in the background. If the fetch fails, the known keys are used for up
    to a day."""
    verify = trusting_worker.access.credential_verifier.verify_bearer
    assert await verify(key.sign(claims(trusting_worker.clock)), KNOWN_ADDRESS)
    key_server.status = 503
    key_server.waiting.clear()
    trusting_worker.clock.now += REFRESH_AGE_SECONDS + 1
    assert await verify(key.sign(claims(trusting_worker.clock)), KNOWN_ADDRESS)
    await key_server.waiting.wait()
    trusting_worker.clock.now += MAX_AGE_SECONDS
    await check_refused(trusting_worker, key.sign(claims(trusting_worker.clock)))


async def test_keys_are_read_from_a_file(
    tmp_path: Path, clock: AuthClock, key: IssuerKey, other_key: IssuerKey
) -> None:
    """A file with keys is read at the first token, and again after it has changed. Private and symmetric keys in it are
    ignored."""
    file = tmp_path / "keys.json"
    async with worker_that_trusts(tmp_path, clock, {"jwks_file": str(file)}) as worker:
        text = key.sign(claims(clock))
        await check_refused(worker, text)
        file.write_bytes(key_set(key.jwk(d="AAAA")))
        await check_refused(worker, text)
        file.write_bytes(key_set(key.jwk(use="enc"), {"kty": "oct", "k": "AAAA", "kid": "one"}))
        await check_refused(worker, text)
        file.write_bytes(key_set(key.jwk(), other_key.jwk()))
        assert await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
        assert await worker.access.credential_verifier.verify_bearer(other_key.sign(claims(clock)), KNOWN_ADDRESS)


@pytest.mark.parametrize("content", [None, b"{", b"[" + b"0," * 200_000 + b"0]"], ids=["missing", "malformed", "large"])
async def test_a_file_without_keys_is_read_once(
    tmp_path: Path, clock: AuthClock, key: IssuerKey, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    """A file that is missing, malformed or too large is read once, and the log says so once, however many tokens
    arrive. When the file has changed, it is read again."""
    file = tmp_path / "keys.json"
    if content is not None:
        file.write_bytes(content)
    async with worker_that_trusts(tmp_path, clock, {"jwks_file": str(file)}) as worker:
        for number in range(3):
            await check_refused(worker, key.sign(claims(clock, n=number)))
        assert caplog.text.count("tokens cannot be verified with the key set in") == 1
        file.write_bytes(key_set(key.jwk()))
        assert await worker.access.credential_verifier.verify_bearer(key.sign(claims(clock)), KNOWN_ADDRESS)


async def test_a_file_that_could_not_be_opened_is_opened_again(
    tmp_path: Path, clock: AuthClock, key: IssuerKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Usually, a file without usable keys is read again only after it has changed. But if the file cannot be opened for
    a moment, for example because too many files are open, it is opened again for the next token. This token is
    accepted."""
    file = tmp_path / "keys.json"
    file.write_bytes(key_set(key.jwk()))
    async with worker_that_trusts(tmp_path, clock, {"jwks_file": str(file)}) as worker:
        with monkeypatch.context() as patched:
            # Raises NotADirectoryError.
            patched.setattr(Path, "open", lambda *_: os.open("/dev/null/none", os.O_RDONLY))
            await check_refused(worker, key.sign(claims(clock)))
        assert await worker.access.credential_verifier.verify_bearer(key.sign(claims(clock, n=1)), KNOWN_ADDRESS)


async def test_token_without_a_key_id(tmp_path: Path, clock: AuthClock, key: IssuerKey, other_key: IssuerKey) -> None:
    """A token without a key id is accepted if exactly one key of the issuer can have signed it."""
    file = tmp_path / "keys.json"
    file.write_bytes(key_set(key.jwk()))
    async with worker_that_trusts(tmp_path, clock, {"jwks_file": str(file)}) as worker:
        text = key.sign(claims(clock), kid=None)
        assert await worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS)
        file.write_bytes(key_set(key.jwk(), other_key.jwk()))
        with pytest.raises(Unauthorized):
            await worker.access.credential_verifier.verify_bearer(key.sign(claims(clock, n=1), kid=None), KNOWN_ADDRESS)


def test_short_rsa_keys_are_ignored() -> None:
    """An RSA key of 1024 bits is ignored, because it is short enough to be factored."""
    assert not jwks.parse_key_set(key_set(IssuerKey("short", "RS256", 1024).jwk()))
    assert len(jwks.parse_key_set(key_set(IssuerKey("long", "RS256").jwk()))) == 1
