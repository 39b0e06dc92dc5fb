"""The parent of the workers: forks them, restarts those that die, and stops them all within a bounded time."""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType

from registry.asgi import AsgiApp
from registry.log_output import flush_output
from registry.server.gate.listener import ListenerOptions
from registry.server.kernel import die_with_parent
from registry.server.process.worker import CANCEL_SECONDS, CLOSE_SECONDS, Worker
from registry.server.server_limits import ServerLimits
from registry.server.server_log import log

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

_KILL_MARGIN = 2 * CANCEL_SECONDS + CLOSE_SECONDS + 2.0
"""Seconds after the grace period until a worker gets SIGKILL."""
_REAP_SECONDS = 5.0
"""For killed workers to end. A process that is stuck in the kernel does not."""
_REPLACE_SECONDS = 60.0
"""For a new worker to start while SIGHUP renews the workers."""
_BACK_OFF = (0.1, 10.0)
"""First and longest pause before a dead worker is restarted."""
_ORDERLY_EXIT_SECONDS = 0.5
"""Pause before a worker that ended in order is restarted. It got a SIGTERM. If that went to the whole process group,
the parent gets it within this time."""
_STABLE_SECONDS = 10.0
"""A worker that lived this long did not fail to start."""


@dataclass(slots=True)
class _WorkerProcess:
    pid: int
    slot: int
    status: int
    """Reading end of the pipe on which the worker writes "ready", or why it failed."""
    started: float
    column: int | None
    """The column of the per-address limit in which it counts its connections."""
    output: bytearray = field(default_factory=bytearray)
    """What the worker has written to the pipe."""
    ready: bool = False
    retiring: bool = False
    kill_at: float = float("inf")


class Supervisor:
    """Handles signals: SIGTERM and SIGINT stop the server, a second SIGINT at once. SIGHUP renews the workers one after
    another; each old one drains once its successor serves. All processes share the parent's process group.
    """

    def __init__(
        self,
        make_app: Callable[[], AsgiApp],
        sockets: Sequence[socket.socket],
        workers: int,
        grace: float,
        limits: ServerLimits,
        on_ready: Callable[[], None] | None,
        listener_options: ListenerOptions,
    ) -> None:
        self._make_app = make_app
        self._sockets = sockets
        self._workers = workers
        self._grace = grace
        self._limits = limits
        self._on_ready = on_ready
        self._listener_options = listener_options
        self._children: dict[int, _WorkerProcess] = {}
        self._due: dict[int, float] = {}  # slot -> when to start its worker
        self._pauses: dict[int, float] = {}  # slot -> pause before its last restart
        self._exit_reasons: dict[int, str] = {}  # slot -> how its worker ended, until it is restarted
        self._renew: list[_WorkerProcess] = []  # workers that SIGHUP has yet to replace
        self._successor: _WorkerProcess | None = None  # of the first of them
        self._served = False  # all workers were ready once
        self._stopping = False
        self._interrupted = False
        self._give_up = float("inf")
        self._code = 0
        self._failure: str | None = None
        self._parent = os.getpid()
        self._wake, self._waker = os.pipe()
        self._alive, self._alive_writer = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._waker, False)
        # poll, not epoll: a child would share an epoll set with its parent.
        self._selector = selectors.PollSelector()

    def run(self) -> tuple[int, str | None]:
        """Returns when all workers are gone: the exit code and, after a failed start, the reason in one line.

        To be called in the main thread: the kernel ends the workers with the thread that forked them.
        """
        self._selector.register(self._wake, selectors.EVENT_READ)
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        wakeup = signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        try:
            self._due = dict.fromkeys(range(self._workers), 0.0)
            self._loop()
        finally:
            self._kill_all()
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._selector.close()
            for end in (self._wake, self._waker, self._alive, self._alive_writer):
                os.close(end)
        return self._code, self._failure

    def _loop(self) -> None:
        while not self._stopping or self._children:
            now = time.monotonic()
            if now > self._give_up:
                log.error("the kernel does not end the workers %s; leaving them", sorted(self._children))
                return
            self._start_due(now)
            self._kill_overdue(now)
            for key, _ in self._selector.select(self._select_timeout(now)):
                if key.fd == self._wake:
                    self._take_signals()
                else:
                    self._read_status(key.data)
            self._reap()
            self._advance()

    def _select_timeout(self, now: float) -> float | None:
        times = [*self._due.values(), *(child.kill_at for child in self._children.values()), self._give_up]
        if self._successor is not None:
            times.append(self._successor.started + _REPLACE_SECONDS)
        first = min(times)
        return None if first == float("inf") else max(0.0, first - now) + 0.001

    # Starting

    def _start_due(self, now: float) -> None:
        for slot in [slot for slot, when in self._due.items() if when <= now]:
            del self._due[slot]
            if slot in self._exit_reasons:
                log.warning(self._exit_reasons.pop(slot))
            self._fork(slot)

    def _fork(self, slot: int) -> _WorkerProcess:
        limit = self._listener_options.per_address_limit
        column = None if limit is None else limit.claim_column()
        status, status_writer = os.pipe()
        flush_output()  # or the child would write it again
        # Signals wait until the child has its handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                os._exit(self._run_worker(status, status_writer, column))
        except OSError:
            os.close(status)
            raise
        finally:
            os.close(status_writer)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.set_blocking(status, False)
        child = _WorkerProcess(pid, slot, status, time.monotonic(), column)
        self._children[pid] = child
        self._selector.register(status, selectors.EVENT_READ, child)
        return child

    def _run_worker(self, status: int, status_writer: int, column: int | None) -> int:
        """Runs the worker in the child; returns the exit code. Nothing of the parent's state may be used in it."""
        code = 1
        try:
            if not die_with_parent(self._parent):
                return 1
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            ends = [child.status for child in self._children.values()]
            for end in (self._wake, self._waker, self._alive_writer, status, *ends):
                os.close(end)
            if self._listener_options.per_address_limit is not None:
                self._listener_options.per_address_limit.use_column(column)
            worker = Worker(
                self._make_app,
                self._sockets,
                self._grace,
                self._limits,
                lambda: _write_line(status_writer, "ready"),
                listener_options=self._listener_options,
                alive=self._alive,
            )
            code, failure = worker.run()
            if failure is not None:
                _write_line(status_writer, failure)
        except BaseException:
            traceback.print_exc()
        finally:
            logging.shutdown()
            flush_output()
        return code

    # Watching

    def _take_signals(self) -> None:
        for number in os.read(self._wake, 4096):
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop()
            elif number == signal.SIGHUP and self._served and not self._stopping and not self._renew:
                self._renew = list(self._children.values())

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """Ends everything at a second SIGINT. The interpreter calls it, even while a write to the log blocks the loop.
        The loop handles the other signals, which it reads from the pipe."""
        if number != signal.SIGINT:
            return
        if self._interrupted or self._stopping:
            self._end_workers()
            os._exit(128 + number)
        self._interrupted = True

    def _read_status(self, child: _WorkerProcess) -> None:
        text = os.read(child.status, 65536)
        child.output += text
        if not text:
            self._selector.unregister(child.status)
        if not child.ready and child.output.startswith(b"ready\n"):
            child.ready = True
            del child.output[: len(b"ready\n")]

    def _reap(self) -> None:
        for child in list(self._children.values()):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid == 0:
                continue
            if child.status in self._selector.get_map():
                self._drain_status(child)
                self._selector.unregister(child.status)
            os.close(child.status)
            del self._children[pid]
            if self._listener_options.per_address_limit is not None:
                self._listener_options.per_address_limit.release_column(child.column)
            self._on_exit(child, os.waitstatus_to_exitcode(status))

    def _drain_status(self, child: _WorkerProcess) -> None:
        try:
            while text := os.read(child.status, 65536):
                child.output += text
        except BlockingIOError:
            pass  # a process that the worker started still holds the other end

    def _on_exit(self, child: _WorkerProcess, code: int) -> None:
        replaced = self._successor is not None and child is self._renew[0]
        if child in self._renew:
            self._renew.remove(child)
        if self._stopping or child.retiring:
            return
        if replaced:
            self._successor = None  # it has replaced this one, and is a worker like any other now
            return
        if child is self._successor:
            self._abandon_renewal(f"the new worker {_describe_exit(child, code)}")
            return
        if not self._served:
            self._code = 1
            self._failure = child.output.decode(errors="replace").strip() or f"a worker {_describe_exit(child, code)}"
            self._stop()
            return
        now = time.monotonic()
        pause = self._pauses.get(child.slot, 0.0)
        if code == 0 or (child.ready and now - child.started >= _STABLE_SECONDS):
            pause = 0.0
        self._pauses[child.slot] = min(max(pause * 2, _BACK_OFF[0]), _BACK_OFF[1])
        if code == 0:
            pause = _ORDERLY_EXIT_SECONDS
        self._due[child.slot] = now + pause
        self._exit_reasons[child.slot] = (
            f"the worker {child.pid} {_describe_exit(child, code)}; starting it again after {pause:g} s"
        )

    def _advance(self) -> None:
        """Continues a start or a renewal when workers have become ready."""
        if self._stopping:
            return
        if not self._served and len(self._children) == self._workers and all(c.ready for c in self._children.values()):
            self._served = True
            if self._on_ready is not None:
                self._on_ready()
        if self._successor is not None:
            if self._successor.ready:
                self._retire(self._renew.pop(0))
                self._successor = None
            elif time.monotonic() - self._successor.started > _REPLACE_SECONDS:
                late = self._successor
                late.retiring = True
                os.kill(late.pid, signal.SIGKILL)
                self._abandon_renewal(f"the new worker was not ready within {_REPLACE_SECONDS:g} s")
        if self._successor is None and self._renew:
            self._successor = self._fork(self._renew[0].slot)

    def _abandon_renewal(self, why: str) -> None:
        log.error("the workers are not renewed: %s", why)
        self._renew.clear()
        self._successor = None

    # Stopping

    def _retire(self, child: _WorkerProcess) -> None:
        child.retiring = True
        child.kill_at = time.monotonic() + self._grace + _KILL_MARGIN
        os.kill(child.pid, signal.SIGTERM)

    def _stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._due.clear()
            self._renew.clear()
            self._successor = None
            for sock in self._sockets:
                sock.close()  # once the workers close theirs too, new connections are refused instead of left waiting
            for child in self._children.values():
                self._retire(child)
            self._give_up = time.monotonic() + self._grace + _KILL_MARGIN + _REAP_SECONDS

    def _kill_overdue(self, now: float) -> None:
        for child in self._children.values():
            if child.kill_at <= now:
                child.kill_at = float("inf")
                os.kill(child.pid, signal.SIGKILL)  # not reaped yet, so the pid is still the child's

    def _kill_all(self) -> None:
        """Kills all workers that are left, also after an unexpected error here."""
        until = time.monotonic() + _REAP_SECONDS
        for child in self._children.values():
            os.kill(child.pid, signal.SIGKILL)
        while self._children and time.monotonic() < until:
            self._stopping = True
            self._reap()
            time.sleep(0.005)

    def _end_workers(self) -> None:
        """Kills the workers, and waits for a bounded time. May interrupt any other method, so it changes no state."""
        left = [pid for pid in self._children if not _reaped(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + _REAP_SECONDS
        while left and time.monotonic() < until:
            left = [pid for pid in left if not _reaped(pid)]
            time.sleep(0.005)


def _reaped(pid: int) -> bool:
    """Returns whether this child has ended. Until it is reaped, no other process can get its pid."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _write_line(pipe: int, text: str) -> None:
    os.write(pipe, text.encode() + b"\n")


def _describe_exit(child: _WorkerProcess, code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    reason = child.output.decode(errors="replace").strip()
    return f"ended with exit code {code}" + (f" ({reason})" if reason else "")
