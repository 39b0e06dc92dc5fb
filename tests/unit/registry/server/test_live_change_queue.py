"""Reloads and restarts of a running server, in the supervisor (the parent of the workers) and in a server that is a
single process."""

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
from registry.server.process.live_change import ChangeOutcome, ChangeRefused, Proposal
from registry.server.process.live_change_options import LiveChangeOptions
from registry.server.process.live_change_queue import ChangingSupervisor, LiveChangeQueue
from registry.server.process.single_process import SingleProcessReloads
from registry.server.process.successor import Handover, SuccessorCheck, describe_worker
from registry.server.process.systemd import Notifier
from registry.server.process.worker_options import WorkerOptions
from registry.server.process.worker_pool import WorkerPool
from registry.server.process.worker_process import WorkerProcess
from registry.server.server_limits import ServerLimits
from tests.fakes.open_files import no_descriptor_left


class FakeConfigurationSource:
    """A source of configurations. `error`: raised when the configuration is read. `accept_error`: raised when the
    configuration is put in force. `accepted`: how many configurations were put in force."""

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

    def watch_successor_check(self, check: SuccessorCheck) -> None:
        raise ValueError("a bug")

    def end_successor_check(self, check: SuccessorCheck) -> None:
        check.close()


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    """A pool without running workers."""
    ends = os.pipe()
    with selectors.PollSelector() as selector:
        listener = ListenerOptions(per_address_limit=PerAddressLimit(1, 1))
        options = WorkerOptions(lambda: cast(Any, None), [], 1.0, 1.0, ServerLimits(), listener)
        yield WorkerPool(options, selector, ends, lambda *_: None, lambda *_: None, list)
    for end in ends:
        os.close(end)


def changes(pool: WorkerPool, source: FakeConfigurationSource) -> LiveChangeQueue:
    return LiveChangeQueue(cast(ChangingSupervisor, BrokenSupervisor()), pool, source, None, Notifier(None))


async def test_a_single_process_closes_an_application_it_cannot_put_in_force() -> None:
    """A server that is a single process prepares an application with the new settings. If it cannot put the settings in
    force, it closes this application."""
    commands, done = list[str](), asyncio.get_running_loop().create_future()

    async def run_command(name: str, payload: bytes) -> None:
        commands.append(name)

    source = FakeConfigurationSource(accept_error=ValueError("it is wrong"))
    live = SingleProcessReloads(LiveChangeOptions(source), lambda: None)
    stop = live.start(asyncio.get_running_loop(), run_command)
    try:
        live._request_reload(done.set_result)
        async with asyncio.timeout(60):
            assert await done == ChangeOutcome(False, "it is wrong")
    finally:
        stop()
    assert commands == ["prepare", "discard"]


def test_old_workers_refuse_the_reload(pool: WorkerPool) -> None:
    """After an abandoned restart, the new supervisor still has workers of the old one, with other settings. Until it
    has told them to end, a reload is refused, because the supervisor would compare the new settings with its own, not
    with those of the workers."""
    (supervisor_end, worker_end), (status, writer) = socket.socketpair(), os.pipe()
    fields = describe_worker(WorkerProcess(7, 1, status, 5.0, None, supervisor_end, is_ready=True))
    (worker,) = Handover([], (0, 1), None, [], [fields], {}).adopted_workers()
    supervisor_end.detach()
    pool.adopt(worker)
    source, outcomes = FakeConfigurationSource(), list[ChangeOutcome]()
    live = changes(pool, source)
    live.request_reload(outcomes.append)
    live.step(time.monotonic())
    assert [outcome.ok for outcome in outcomes] == [False]
    assert "run `entrepot restart`" in outcomes[0].message
    worker.exit_expected = True
    live.request_reload(outcomes.append)
    live.step(time.monotonic())
    assert [outcome.ok for outcome in outcomes] == [False, True]
    for end in (worker.commands, worker_end):
        end.close()
    for file in (status, writer):
        os.close(file)


@pytest.mark.parametrize("error", [ChangeRefused("it is wrong"), OSError(5, "it is wrong"), ValueError("it is wrong")])
def test_a_failed_reload_leaves_the_server_running(pool: WorkerPool, error: Exception) -> None:
    """If a step of a reload fails, the server keeps running, and the next reload works."""
    source, outcomes = FakeConfigurationSource(error), list[ChangeOutcome]()
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
    outcomes = list[ChangeOutcome]()
    live = changes(pool, FakeConfigurationSource(accept_error=ValueError("it is wrong")))
    live.request_reload(outcomes.append)
    live.step(time.monotonic())
    assert outcomes == [ChangeOutcome(False, "it is wrong")]


def test_a_failed_restart_leaves_the_server_running(pool: WorkerPool) -> None:
    """If a step of a restart fails, the restart is over and the server keeps running."""
    outcomes = list[ChangeOutcome]()
    live = changes(pool, FakeConfigurationSource())
    live.request_restart(outcomes.append)
    live.step(time.monotonic())
    assert outcomes == [ChangeOutcome(False, "a bug")]
    assert live.running_change == ""


def test_reload_without_workers(pool: WorkerPool) -> None:
    """If no worker runs, a reload takes effect at once, because the next workers start with the new configuration."""
    source, outcomes = FakeConfigurationSource(), list[ChangeOutcome]()
    live = changes(pool, source)
    live.request_reload(outcomes.append)
    live.step(time.monotonic())
    assert [outcome.ok for outcome in outcomes] == [True]
    assert source.accepted == 1
    assert not live.forbids_forks


@pytest.mark.parametrize("free", range(4))
@pytest.mark.slow
def test_a_worker_that_cannot_be_started_leaves_no_open_file(pool: WorkerPool, free: int) -> None:
    """If a worker cannot be started because too many files are open, no file stays open. `free`: the number of files
    that the process may still open. A worker needs four."""
    limit = pool._options.listener_options.per_address_limit
    assert limit is not None
    free_columns = len(limit._free_columns)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with no_descriptor_left():
        lowest_free_descriptor = os.dup(0)
        os.close(lowest_free_descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free_descriptor + free, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                pool.fork(0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(limit._free_columns) == free_columns


@pytest.mark.parametrize("ready", [False, True])
def test_a_handed_over_worker_keeps_its_readiness(ready: bool) -> None:
    """During a restart, the new supervisor takes over the running workers. The handover states for each worker whether
    it is ready."""
    ends = socket.socketpair()
    worker = WorkerProcess(7, 1, 99, 5.0, None, ends[0], is_ready=ready)
    handover = Handover([], (0, 1), None, [], [describe_worker(worker)], {})
    (adopted,) = handover.adopted_workers()
    assert (adopted.pid, adopted.index, adopted.is_ready) == (7, 1, ready)
    adopted.commands.detach()  # the same descriptor as that of `worker`
    for end in ends:
        end.close()
