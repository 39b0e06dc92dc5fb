"""The limits on streams of events (`registry.admin.event_stream`)."""

from __future__ import annotations

from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest
from fastapi import Request

from registry.admin.caller import identify_caller
from registry.admin.event_stream import MAX_STREAMS_PER_VISITOR, EventStream
from storage.access import AccountName
from storage.errors import TooManyRequests, Unauthorized
from tests.fakes.app_in_process import AppInProcess, running_app
from tests.fakes.store_accounts import BY


async def stream_of(site: AppInProcess, login: str) -> EventStream:
    """Returns a stream for the account with this Authorization header. The stream is not open yet."""
    headers = [(b"host", b"registry.test"), (b"authorization", login.encode())]
    scope = {"type": "http", "method": "GET", "path": "/api/v1/events", "headers": headers, "app": site.app}
    request = Request(scope | {"client": ("192.0.2.1", 1), "query_string": b"", "scheme": "https"})
    return EventStream(request, None, lambda event, caller: None, await identify_caller(request, None, None))


async def test_an_account_has_a_largest_number_of_streams(tmp_path: Path) -> None:
    """One account gets only a few streams at the same time. A further stream is refused, with a time to wait, until one
    of them is closed. Other accounts still get streams."""
    async with running_app(tmp_path) as site, AsyncExitStack() as stack:
        alice, bob = await site.user("alice"), await site.user("bob")
        streams = [await (await stream_of(site, alice)).open() for _ in range(MAX_STREAMS_PER_VISITOR)]
        for stream in streams:
            await stack.enter_async_context(aclosing(stream))
        with pytest.raises(TooManyRequests, match="close one of them") as refused:
            await (await stream_of(site, alice)).open()
        assert refused.value.retry_after > 0
        await stack.enter_async_context(aclosing(await (await stream_of(site, bob)).open()))
        await streams[0].aclose()
        await stack.enter_async_context(aclosing(await (await stream_of(site, alice)).open()))
        await stack.aclose()
        assert not site.app.event_streams


async def test_an_open_stream_checks_the_credential_again(tmp_path: Path) -> None:
    """A stream authenticates its request again while it is open. After the account was disabled, this fails."""
    async with running_app(tmp_path) as site:
        stream = await stream_of(site, await site.user("alice"))
        assert (await stream.identify_again()).principal.name == "alice"
        await site.accounts.set_enabled(AccountName("alice"), False, by=BY)
        with pytest.raises(Unauthorized):
            await stream.identify_again()
