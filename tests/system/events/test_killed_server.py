"""Tests that kill a running server with SIGKILL while clients push. The event of every acknowledged push still reaches
the webhook."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest

from tests.fakes.event_site import digest_named, push_with, webhook_table
from tests.fakes.plain_client import plain_client
from tests.fakes.server_process import RegistryServer, start_server
from tests.fakes.webhook_receiver import first_events, receiver_running

PUSHERS = 4
"""The number of clients that push at the same time."""


@dataclass
class Pushes:
    """The pushes of one client to its own repository. `started`: the names of all pushed images, in order.
    `acknowledged`: the names of those whose push got a response."""

    repository: str
    started: list[str] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    failure: BaseException | None = None

    def run(self, server: RegistryServer, killing: threading.Event, done: threading.Semaphore) -> None:
        """Pushes images until the server is killed. Releases `done` after each push, and at the end."""
        try:
            with plain_client(server.url, timeout=60) as client:
                while True:
                    name = f"{self.repository} {len(self.started)}"
                    self.started.append(name)
                    assert push_with(client, self.repository, f"t{len(self.started) % 7}", name).status_code == 201
                    self.acknowledged.append(name)
                    done.release()
        except httpx2.HTTPError as error:
            if not killing.is_set():
                self.failure = error
        except BaseException as error:
            self.failure = error
        finally:
            done.release()


def kill_under_load(folder: Path, kills: int) -> None:
    """Kills the server `kills` times while clients push, and checks the events that the receiver of the webhook
    gets."""
    pushes = [Pushes(f"team/app{number}") for number in range(PUSHERS)]
    chance = random.Random(kills)
    with receiver_running() as receiver:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "entrepot.toml").write_text(webhook_table(receiver.url))
        config = ("--config", str(folder / "entrepot.toml"))
        for _ in range(kills):
            server = start_server(folder, *config)
            killing, done = threading.Event(), threading.Semaphore(0)
            threads = [threading.Thread(target=each.run, args=(server, killing, done)) for each in pushes]
            for thread in threads:
                thread.start()
            for _ in range(chance.randrange(5, 40)):
                done.acquire()
            killing.set()
            server.kill()
            for thread in threads:
                thread.join()
            assert [each.failure for each in pushes] == [None] * PUSHERS
        server = start_server(folder, *config)
        expected = {digest_named(name) for each in pushes for name in each.acknowledged}

        def event_digests() -> list[str]:
            return [body["data"]["digest"] for body in first_events(receiver.accepted())]

        receiver.wait_for(lambda: expected <= set(event_digests()), "event of each acknowledged push")
        assert server.stop() == 0
    assert set(event_digests()) <= {digest_named(name) for each in pushes for name in each.started}
    assert len(event_digests()) == len(set(event_digests()))
    for each in pushes:
        order = {digest_named(name): number for number, name in enumerate(each.started)}
        numbers = [order[digest] for digest in event_digests() if digest in order]
        assert numbers == sorted(numbers)


def test_no_event_is_lost_in_three_kills(tmp_path: Path) -> None:
    """The receiver gets one event for each acknowledged push, in order for each repository. A push without a response
    may or may not have an event."""
    kill_under_load(tmp_path, 3)


@pytest.mark.slow
def test_no_event_is_lost_in_twenty_kills(tmp_path: Path) -> None:
    """After 20 kills as well, the receiver has got the event of each acknowledged push."""
    kill_under_load(tmp_path, 20)
