"""The memory for manifests and configs that are sent as they were pushed."""

from __future__ import annotations

import asyncio
import logging

import pytest

from registry.admin.archive_response import InMemoryResponse, ResponseCutOff
from registry.asgi import Message
from registry.browse import answer_memory_limit
from registry.browse.answer_memory_limit import AnswerMemoryLimit
from registry.log_output import was_logged
from registry.memory_budget import MIB
from storage.errors import TooManyRequests
from tests.unit.registry.browse.conftest import APP, Site

SCOPE = {"type": "http"}


class SlowClients:
    """Clients that receive the start of their responses, and no more before `finish` is set."""

    def __init__(self, memory: AnswerMemoryLimit) -> None:
        self.finish = asyncio.Event()
        self.requests: list[asyncio.Task[None]] = []
        self._memory = memory

    async def request(self, visitor: str, size: int = MIB) -> asyncio.Task[None]:
        """Sends a response of `size` bytes to a client of this visitor. Returns its task when the client has received
        the start."""
        has_started = asyncio.Event()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                has_started.set()
            else:
                await self.finish.wait()

        request = asyncio.ensure_future(InMemoryResponse(b"x" * size, self._memory, visitor)(SCOPE, never, send))
        self.requests.append(request)
        await has_started.wait()
        return request

    async def close(self) -> None:
        self.finish.set()
        await asyncio.gather(*self.requests, return_exceptions=True)


async def never() -> Message:
    raise AssertionError("a response receives nothing")


async def ask(memory: AnswerMemoryLimit, visitor: str, size: int = MIB) -> None:
    """Sends a response of `size` bytes to a fast client. Raises TooManyRequests if it is refused."""

    async def send(message: Message) -> None:
        pass

    await InMemoryResponse(b"x" * size, memory, visitor)(SCOPE, never, send)


async def test_answers_count_until_they_are_sent() -> None:
    """The bytes of an answer count until its client has received them. If too little memory is left, a further answer
    is refused, with a time to wait."""
    memory = AnswerMemoryLimit(16 * MIB)
    clients = SlowClients(memory)
    for number in range(12):  # the last quarter is for small answers
        await clients.request(f"visitor {number}")
    with pytest.raises(TooManyRequests) as refused:
        await ask(memory, "carol")
    assert refused.value.retry_after > 0
    await ask(memory, "carol", 1000)
    await clients.close()
    assert memory.used == 0
    await ask(memory, "carol")


async def test_one_visitor_gets_a_part_of_the_memory() -> None:
    """The answers of one visitor together get a quarter of the memory. So others get theirs, however slowly one visitor
    receives. A single answer may be larger than this part."""
    memory = AnswerMemoryLimit(16 * MIB)
    clients = SlowClients(memory)
    for _ in range(4):
        await clients.request("bob")
    with pytest.raises(TooManyRequests):
        await ask(memory, "bob")
    await ask(memory, "carol", 4 * MIB)
    await ask(memory, "dave", 6 * MIB)
    await clients.close()
    await ask(memory, "bob")


@pytest.mark.parametrize("visitor", ["bob", "carol"])
async def test_a_slow_answer_ends_when_another_is_refused(
    visitor: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When an answer is refused, those that have been sent for too long end, the oldest first, until there is memory
    for the refused one. The next attempt succeeds. If the visitor has used up its own part, only its own answers end.
    Each end is logged in one line, and not once more by the server."""
    caplog.set_level(logging.INFO)
    memory = AnswerMemoryLimit(8 * MIB)
    clients = SlowClients(memory)
    first = await clients.request("dave", MIB)
    oldest, *others = [await clients.request(name, MIB) for name in ("bob", "bob", "eve", "eve", "fred")]
    with pytest.raises(TooManyRequests):  # no answer has been sent for too long
        await ask(memory, visitor)
    await asyncio.sleep(0)
    assert not any(request.done() for request in clients.requests)
    monkeypatch.setattr(answer_memory_limit, "SLOW_SECONDS", 0.0)
    with pytest.raises(TooManyRequests) as refused:
        await ask(memory, visitor)
    assert refused.value.retry_after == 1
    ended, kept = (oldest, first) if visitor == "bob" else (first, oldest)
    with pytest.raises(ResponseCutOff) as cut_off:
        await ended
    assert was_logged(cut_off.value)
    assert not any(request.done() for request in (kept, *others))
    (record,) = [each for each in caplog.records if each.levelno >= logging.INFO]
    assert (record.levelno, record.exc_info) == (logging.INFO, None)
    await ask(memory, visitor)
    await clients.close()


async def test_an_answer_that_fails_leaves_no_bytes() -> None:
    """If a response cannot be sent, or is cancelled, its bytes no longer count. A TimeoutError of the connection is not
    taken for the end of a slow answer."""
    memory = AnswerMemoryLimit(8 * MIB)

    async def send(message: Message) -> None:
        raise TimeoutError("the connection timed out")

    with pytest.raises(TimeoutError, match="the connection"):
        await InMemoryResponse(b"x", memory, "bob")(SCOPE, never, send)
    request = await SlowClients(memory).request("bob")
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert memory.used == 0


@pytest.mark.parametrize("kind", ["raw", "config"])
async def test_the_api_counts_manifests_and_configs_for_their_account(site: Site, kind: str) -> None:
    """A manifest or a config in a response of the API counts for the account that requests it. Another account gets
    its response while the part of the first account is used up."""
    await site.image("v1")
    memory = site.app.app.service.access.management.repository_browser.answer_memory_limit  # type: ignore[union-attr]
    path = f"{APP}/manifests/v1/{kind}"
    async with memory.hold("account puller", memory.size // 4):
        assert (await site.get(path)).status == 429
        assert (await site.get(path, "root")).status == 200
    assert (await site.get(path)).status == 200
