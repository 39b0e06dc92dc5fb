"""A worker that trusts an issuer of tokens, and the claims of such tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from storage.errors import Unauthorized
from tests.fakes.auth_worker import ALICE, CI, KNOWN_ADDRESS, AuthClock, AuthWorker, auth_worker
from tests.fakes.token_issuer import AUDIENCE, ISSUER


def claims(clock: AuthClock, **changes: Any) -> dict[str, Any]:
    return {"iss": ISSUER, "aud": AUDIENCE, "exp": clock() + 600, "iat": clock(), "sub": "job 1", **changes}


@asynccontextmanager
async def worker_that_trusts(tmp_path: Path, clock: AuthClock, *issuers: dict[str, Any]) -> AsyncIterator[AuthWorker]:
    """Yields a worker whose settings trust these issuers. Its store has the user alice and the robot account ci."""
    tables = [{"issuer": ISSUER, "audience": AUDIENCE, "account": "ci", **each} for each in issuers]
    tables = [{name: value for name, value in each.items() if value is not None} for each in tables]
    async with auth_worker(tmp_path / "data", clock, {"issuer": tables}) as worker:
        await worker.add_user(ALICE)
        await worker.add_robot()
        yield worker


async def check_refused(worker: AuthWorker, text: str) -> None:
    """Checks that a token is refused as a bearer token and as a password, with the usual error text."""
    for verify in (
        worker.access.credential_verifier.verify_bearer(text, KNOWN_ADDRESS),
        worker.access.credential_verifier.verify_basic(CI, text, KNOWN_ADDRESS),
    ):
        with pytest.raises(Unauthorized) as error:
            await verify
        assert error.value.message == "the credentials are not valid"
