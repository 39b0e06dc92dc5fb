"""The changes of a running server, as its supervisor sees them."""

from __future__ import annotations

import asyncio
import os
import resource
import selectors
import socket
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from registry.server.gate.listener import ListenerOptions
from registry.server.gate.per_address_limit import PerAddressLimit
from registry.server.process.live_change import ChangeRefused, Outcome, Proposal
from registry.server.process.live_changes import ChangingSupervisor, LiveChanges
from registry.server.process.live_options import LiveOptions
from registry.server.process.single_process import SingleProcessChanges
from registry.server.process.successor import Handover, SuccessorCheck, describe_worker
from registry.server.process.systemd import Notifier
from registry.server.process.worker_options import WorkerOptions
from registry.server.process.worker_pool import WorkerPool
from registry.server.process.worker_process import WorkerProcess
from registry.server.server_limits import ServerLimits


class Source:
    """A source of configurations. `error`: is raised when the configuration is read; `accept_error`: when it is put in
    force."""

    def __init__(self, error: Exception | None = None, accept_error: Exception | None = None) -> None:
        self.error = error
        self.accept_error = accept_error
        self.accepted = 0

    def propose(self) -> Proposal:
        if self.error is not None:
            raise self.error
        return Proposal(b"", "")

    def accept(self, proposal: Proposal) -> None:
        if self.accept_error is not None:
            raise self.accept_error
        self.accepted += 1


class BrokenSupervisor:
    """A supervisor in which every step of a restart raises an unexpected exception."""

    def begin_renewal(self) -> Any:
        raise ValueError("a bug")

    def execute_successor(self) -> None:
        raise ValueError("a bug")

    def watch_check(self, check: SuccessorCheck) -> None:
        raise ValueError("a bug")

    def end_check(self, check: SuccessorCheck) -> None:
        check.close()


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    """A pool without running workers."""
    ends = os.pipe()
    with selectors.PollSelector() as selector:
        listener = ListenerOptions(per_address_limit=PerAddressLimit(1, 1))
        options = WorkerOptions(lambda: cast(Any, None), [], 1.0, 1.0, ServerLimits(), listener)
        yield WorkerPool(options, selector, ends, lambda *_: None, lambda *_: None)
    for end in ends:
        os.close(end)


def changes(pool: WorkerPool, source: Source) -> LiveChanges:
    return LiveChanges(cast(ChangingSupervisor, BrokenSupervisor()), pool, source, None, Notifier(None))


async def test_a_single_process_drops_what_it_cannot_put_in_force() -> None:
    """If a single process cannot put the new settings in force, it closes the application that it has prepared."""
    commands, done = list[str](), asyncio.get_running_loop().create_future()

    async def run_command(name: str, payload: bytes) -> None:
        commands.append(name)

    source = Source(accept_error=ValueError("it is wrong"))
    live = SingleProcessChanges(LiveOptions(source), lambda: None)
    end = live.start(asyncio.get_running_loop(), run_command)
    try:
        live._request_reload(done.set_result)
        async with asyncio.timeout(60):
            assert await done == Outcome(False, "it is wrong")
    finally:
        end()
    assert commands == ["prepare", "discard"]


def test_old_workers_refuse_the_reload(pool: WorkerPool) -> None:
    """After an abandoned restart, workers with the old settings still serve. A reload is refused until these workers
    have ended, because it would compare the new settings with those of this process, and not with theirs."""
    (ours, commands), (status, writer) = socket.socketpair(), os.pipe()
    fields = describe_worker(WorkerProcess(7, 1, status, 5.0, None, ours, ready=True))
    (worker,) = Handover([], (0, 1), None, [], [fields], {}).adopted_workers()
    ours.detach()
    pool.adopt(worker)
    source, outcomes = Source(), list[Outcome]()
    live = changes(pool, source)
    live.request_reload(outcomes.append)
    live.step(time.monotonic())
    assert [outcome.ok for outcome in outcomes] == [False]
    assert "run `entrepot restart`" in outcomes[0].message
    worker.exit_expected = True
    live.request_reload(outcomes.append)
    live.step(time.monotonic())
    assert [outcome.ok for outcome in outcomes] == [False, True]
    for end in (worker.commands, commands):
        end.close()
    for file in (status, writer):
        os.close(file)


@pytest.mark.parametrize("error", [ChangeRefused("it is wrong"), OSError(5, "it is wrong"), ValueError("it is wrong")])
def test_errors_refuse_the_reload(pool: WorkerPool, error: Exception) -> None:
    """If a step of a reload fails, the server keeps running, and the next reload works."""
    source, outcomes = Source(error), list[Outcome]()
    live = changes(pool, source)
    live.request_reload(outcomes.append)
    live.step(time.monotonic())
    assert [outcome.ok for outcome in outcomes] == [False]
    assert "it is wrong" in outcomes[0].message
    source.error = None
    live.request_reload(outcomes.append)
    live.step(time.monotonic())
    assert [outcome.ok for outcome in outcomes] == [False, True]


def test_a_configuration_that_cannot_be_put_in_force(pool: WorkerPool) -> None:
    """If the new configuration cannot be put in force, the reload is refused."""
    outcomes = list[Outcome]()
    live = changes(pool, Source(accept_error=ValueError("it is wrong")))
    live.request_reload(outcomes.append)
    live.step(time.monotonic())
    assert outcomes == [Outcome(False, "it is wrong")]


def test_errors_refuse_the_restart(pool: WorkerPool) -> None:
    """If a step of a restart fails, the server keeps running, and the next restart works."""
    outcomes = list[Outcome]()
    live = changes(pool, Source())
    live.request_restart(outcomes.append)
    live.step(time.monotonic())
    assert outcomes == [Outcome(False, "a bug")]
    assert live.running == ""


def test_reload_without_workers(pool: WorkerPool) -> None:
    """If no worker runs, a reload takes effect at once: the next workers have the new configuration."""
    source, outcomes = Source(), list[Outcome]()
    live = changes(pool, source)
    live.request_reload(outcomes.append)
    live.step(time.monotonic())
    assert [outcome.ok for outcome in outcomes] == [True]
    assert source.accepted == 1
    assert not live.holds_forks


@pytest.mark.parametrize("free", range(4))
def test_no_process_can_be_started(pool: WorkerPool, free: int) -> None:
    """If a worker cannot be started, no file stays open. `free`: how many more files the process may open; a worker
    needs four."""
    limit = pool._options.listener_options.per_address_limit
    assert limit is not None
    columns = len(limit._free_columns)
    before = sorted(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            pool.fork(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert len(limit._free_columns) == columns


@pytest.mark.parametrize("ready", [False, True])
def test_handed_over_worker(ready: bool) -> None:
    """The new version of the program knows whether a worker that it takes over is ready."""
    ends = socket.socketpair()
    worker = WorkerProcess(7, 1, 99, 5.0, None, ends[0], ready=ready)
    handover = Handover([], (0, 1), None, [], [describe_worker(worker)], {})
    (adopted,) = handover.adopted_workers()
    assert (adopted.pid, adopted.index, adopted.ready) == (7, 1, ready)
    adopted.commands.detach()  # the same descriptor as that of `worker`
    for end in ends:
        end.close()
