"""Sends the generated malformed requests to a server over several connections, and checks the responses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from tests.fakes.process_resources import eventually, files_below
from tests.fakes.raw_http import ConnectionClosed, RawAnswer, RawConnection, message
from tests.fakes.raw_pushes import RawPushes, digest_of, image
from tests.fakes.second_connection import second_connection
from tests.fakes.server_process import RegistryServer
from tests.system.fuzz.fuzz_case import CODES, FuzzCase
from tests.system.fuzz.malformed_content import BLOB, CONTENTS, REPO, TAG
from tests.system.fuzz.malformed_http import FRAMINGS

GENERATORS: Sequence[Callable[[random.Random], FuzzCase]] = (*CONTENTS, *FRAMINGS)
PARALLEL_CONNECTIONS = 4
"""The number of connections over which the cases are sent at the same time."""
VALID_REQUEST_INTERVAL = 7
"""After this number of cases, a valid request on the same connection must succeed."""


def make_case(seed: int, index: int) -> FuzzCase:
    """Returns the case with this number. It depends only on the seed and the number, not on earlier cases."""
    rng = random.Random(f"{seed}/{index}")
    return GENERATORS[index % len(GENERATORS)](rng)


def check_response(case: FuzzCase, answer: RawAnswer) -> None:
    """Checks that the response has an allowed status and the format of errors, and that no header was injected."""
    assert answer.status in case.statuses, f"status {answer.status}: {answer.body[:300]!r}"
    assert answer["docker-distribution-api-version"] == "registry/2.0"
    for name, value in answer.fields:
        assert name != "x-evil", "a header was injected"
        assert value.isprintable(), f"{name} holds {value!r}"
    if case.method == "HEAD":
        return
    assert answer["content-type"] == "application/json"
    document = answer.json()
    assert set(document) == {"errors"}
    assert document["errors"]
    for error in document["errors"]:
        assert error["code"] in CODES, f"{error['code']} is not a code of the spec"
        assert isinstance(error["message"], str)
        assert error["message"]


@dataclass
class FuzzConnection:
    """Sends cases one after another. Uses the same connection as long as the server keeps it open, then opens a new
    one."""

    server: RegistryServer
    seed: int
    wire: RawConnection | None = None
    held_connections: list[RawConnection] = field(default_factory=list)
    """Connections that stay open without further requests (the end `hold` of a case)."""
    history: list[int] = field(default_factory=list)
    """The numbers of the cases that were sent on the current connection."""

    def run(self, indices: Sequence[int]) -> None:
        """Sends the cases with these numbers. Raises AssertionError with all that is needed to repeat a failed case."""
        for index in indices:
            case = make_case(self.seed, index)
            self.history.append(index)
            try:
                self._run_case(case, with_valid_request=index % VALID_REQUEST_INTERVAL == 0)
            except (AssertionError, OSError, ConnectionClosed, ValueError) as error:
                raise AssertionError(
                    f"seed {self.seed}, case {index} ({case.kind}), on a connection that carried {self.history}:\n"
                    f"{type(error).__name__}: {error}\nsent: {case.raw[:2000]!r}"
                ) from error

    def close(self) -> None:
        for wire in (*self.held_connections, *([self.wire] if self.wire else [])):
            wire.close()
        self.held_connections.clear()
        self._drop()

    def _drop(self) -> None:
        """Closes the current connection."""
        if self.wire is not None:
            self.wire.close()
        self.wire = None
        self.history.clear()

    def _open(self) -> RawConnection:
        if self.wire is None:
            self.wire = RawConnection(("127.0.0.1", self.server.port))
        return self.wire

    def _run_case(self, case: FuzzCase, *, with_valid_request: bool) -> None:
        if not case.needs_session:
            self._send(case, case.raw)
        else:
            with RawConnection(("127.0.0.1", self.server.port)) as session_wire:
                steps = RawPushes(session_wire, REPO)
                session = steps.start()
                try:
                    self._send(case, case.filled(session))
                finally:
                    answer = session_wire.ask("DELETE", session)
                    assert answer.status in (204, 404), f"DELETE: {answer.status} {answer.body!r}"
        if with_valid_request and self.wire is not None:
            assert self.wire.ask("GET", "/v2/").status == 200

    def _send(self, case: FuzzCase, raw: bytes) -> None:
        """Sends the bytes of a case, and checks the response."""
        wire = self._open()
        assert not wire.received, f"unexpected bytes on the connection: {bytes(wire.received)!r}"
        # If the server has responded early and closed the connection, the response can still be read.
        with suppress(BrokenPipeError, ConnectionResetError):
            wire.send(raw)
        if case.end == "read one":
            answer = wire.answer(case.method)
            check_response(case, answer)
            assert not answer.interim, "the server has sent 100 for a request that it refuses"
            if answer.closes:
                self._drop()
        elif case.end == "hold":
            self.held_connections.append(wire)
            self.wire = None
            self.history.clear()
        else:
            self._finish(case, wire)
            self._drop()

    @staticmethod
    def _finish(case: FuzzCase, wire: RawConnection) -> None:
        """Ends the connection as the case says. Checks the responses if the case reads them."""
        if case.end == "reset":
            wire.reset()
        if case.end in ("reset", "leave"):
            return
        with suppress(OSError):
            wire.shut()
        count = 0
        with suppress(ConnectionClosed, ConnectionResetError):
            while True:
                check_response(case, wire.answer(case.method))
                count += 1
        assert count or case.end == "read any", "no response"


def run_batch(
    server: RegistryServer, seed: int, indices: Sequence[int], connections: int = PARALLEL_CONNECTIONS
) -> None:
    """Sends the cases with these numbers over several connections in parallel. Raises AssertionError if a response is
    wrong."""
    with ExitStack() as stack, ThreadPoolExecutor(connections) as pool:
        senders = [FuzzConnection(server, seed) for _ in range(connections)]
        for sender in senders:
            stack.callback(sender.close)
        running = [pool.submit(sender.run, indices[number::connections]) for number, sender in enumerate(senders)]
        for future in running:
            future.result()


def prepare(server: RegistryServer) -> None:
    """Pushes the content to which the malformed requests refer."""
    push_and_pull(server)


def push_and_pull(server: RegistryServer) -> None:
    """Pushes the same valid content at each call, pulls it, and checks it."""
    with RawConnection(("127.0.0.1", server.port)) as wire:
        steps = RawPushes(wire, REPO)
        path = steps.blob(BLOB)
        manifest = image(BLOB, BLOB)
        tagged = steps.manifest(manifest, TAG)
        assert steps.get(path).body == BLOB
        pulled = steps.get(tagged)
        assert pulled.body == manifest
        assert pulled["docker-content-digest"] == digest_of(manifest)
        assert wire.ask("GET", f"/v2/{REPO}/tags/list").json()["tags"] == [TAG]


@dataclass(frozen=True)
class StoreCounts:
    """The numbers of files and rows in the data directory."""

    files: int
    rows: tuple[tuple[str, int], ...]


def store_counts(server: RegistryServer) -> StoreCounts:
    """Counts the files of content and uploads, and the rows of each table of the database. Leaves out tables that may
    grow (the history of tags, the audit log), and tables that are written some time after a request (pulls, the times
    in which they were recorded and the activity, the search index)."""
    data = server.data
    db = second_connection(data / "entrepot.db", read_only=True)
    try:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")]
        counts = [(name, int(db.execute(f'SELECT count(*) FROM "{name}"').get)) for name in names]
    finally:
        db.close()
    left_out = ("sqlite_", "tag_history", "audit", "manifest_pull", "recorded_period", "activity", "search")
    rows = tuple((name, count) for name, count in counts if not name.startswith(left_out))
    return StoreCounts(files_below(data / "blobs", data / "uploads", data / "trash"), rows)


def counts_without_sessions(server: RegistryServer) -> StoreCounts:
    """Returns the counts as soon as no upload session and none of its files is left. The client of an earlier request
    may not have waited until the server ended the session."""
    counts = store_counts(server)

    def has_no_session() -> bool:
        nonlocal counts
        has_files = files_below(server.data / "uploads", server.data / "trash") > 0
        counts = store_counts(server)
        return not has_files and ("upload", 0) in counts.rows

    assert eventually(has_no_session), f"an earlier request has left an upload session: {counts}"
    return counts


def send_valid_request(server: RegistryServer) -> None:
    """Sends a valid request on a new connection."""
    with RawConnection(("127.0.0.1", server.port)) as wire:
        wire.send(message("GET", "/v2/"))
        assert json.loads(wire.answer().body) == {}
