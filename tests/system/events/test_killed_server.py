"""SIGKILL of a real server while clients push: no event of an acknowledged change is lost."""

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


@dataclass
class Pushes:
    """The pushes of a client to its repository until the server was killed. `acknowledged`: those with a response, in
    order. `started`: also those without a response."""

    repository: str
    started: list[str] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    failure: BaseException | None = None

    def run(self, server: RegistryServer, killing: threading.Event, done: threading.Semaphore) -> None:
        """Pushes until the server ends."""
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
    """Kills the server `kills` times while clients push and a receiver gets events, and checks the events."""
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
        wanted = {digest_named(name) for each in pushes for name in each.acknowledged}

        def told() -> list[str]:
            return [body["data"]["digest"] for body in first_events(receiver.accepted())]

        receiver.wait_for(lambda: wanted <= set(told()), "event of each acknowledged push")
        assert server.stop() == 0
    assert set(told()) <= {digest_named(name) for each in pushes for name in each.started}
    assert len(told()) == len(set(told()))
    for each in pushes:
        order = {digest_named(name): number for number, name in enumerate(each.started)}
        numbers = [order[digest] for digest in told() if digest in order]
        assert numbers == sorted(numbers)


def test_a_server_that_is_killed_three_times_loses_no_event(tmp_path: Path) -> None:
    """Each acknowledged push has its event, in the order of its repository. A push without a response may have one."""
    kill_under_load(tmp_path, 3)


@pytest.mark.slow
def test_a_server_that_is_killed_twenty_times_loses_no_event(tmp_path: Path) -> None:
    """The same holds for 20 kills."""
    kill_under_load(tmp_path, 20)
