"""A test that kills a real server with SIGKILL while clients push."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import threading
from pathlib import Path

from storage.content import OCI_MANIFEST, digest_of
from tests.fakes.server_process import RegistryServer, running_server, start_server
from tests.system.crash.full_disk import ask, pull, push, start

ROUNDS = 6
"""The number of times that the server is killed."""
PUSHERS = 3
"""The number of clients that push at the same time."""
CONNECTION_ERRORS = (OSError, http.client.HTTPException)
"""The exceptions that a client gets when the server is killed."""


class PushingThread(threading.Thread):
    """Pushes blobs and manifests until the server is killed, and keeps a record of the acknowledged requests.

    `pushed` is released after each push. `killing` is set before the server is killed. `offsets` and `sessions`: the
    acknowledged bytes and the whole body of each upload session, by location."""

    def __init__(
        self, server: RegistryServer, seed: str, pushed: threading.Semaphore, killing: threading.Event
    ) -> None:
        super().__init__()
        self._server = server
        self._random = random.Random(seed)
        self._pushed = pushed
        self._killing = killing
        self.blobs: list[bytes] = []
        self.tags: dict[str, bytes] = {}
        self.offsets: dict[str, int] = {}
        self.sessions: dict[str, bytes] = {}
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while True:
                self._push_image(self._random.randbytes(self._random.choice((10, 5000, 400_000, 3_000_000))))
                self._pushed.release()
        except BaseException as error:
            if not (self._killing.is_set() and isinstance(error, CONNECTION_ERRORS)):
                self.failure = error
        finally:
            self._pushed.release()

    def _push_image(self, body: bytes) -> None:
        """Pushes a blob, and a manifest with this blob as its config under a new tag."""
        status = push(self._server, "team/app", body)[0] if self._random.random() < 0.5 else self._push_in_chunks(body)
        assert status == 201
        self.blobs.append(body)
        part = {"mediaType": "application/json", "digest": digest_of(body), "size": len(body)}
        manifest = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": part, "layers": []}).encode()
        tag = f"t{digest_of(body).encoded[:20]}"
        path = f"/v2/team/app/manifests/{tag}"
        assert ask(self._server, "PUT", path, manifest, Content_Type=OCI_MANIFEST)[0] == 201
        self.tags[tag] = manifest

    def _push_in_chunks(self, body: bytes) -> int:
        """Pushes a blob with up to three PATCH requests and a PUT. Returns the status of the PUT."""
        location = start(self._server, "team/app")
        cuts = [0, *sorted(self._random.randrange(len(body)) for _ in range(2)), len(body)]
        for start_at, stop_at in itertools.pairwise(cuts):
            if start_at == stop_at:
                continue
            status, _, headers = ask(self._server, "PATCH", location, body[start_at:stop_at])
            assert status == 202
            location = headers["location"]
            self.offsets[location], self.sessions[location] = stop_at, body
        joined = location + ("&" if "?" in location else "?")
        status = ask(self._server, "PUT", f"{joined}digest={digest_of(body)}")[0]
        if status == 201:
            del self.offsets[location]
        return status


def test_acknowledged_content_survives_a_killed_server(tmp_path: Path) -> None:
    """The server is killed while clients push. After the restart, every blob and manifest that got a 201 is there, byte
    for byte. An upload session has at least its acknowledged chunks and can be finished, unless its closing request was
    running at the kill."""
    blobs: list[bytes] = []
    for number in range(ROUNDS):
        server = start_server(tmp_path)
        try:
            pushed, killing = threading.Semaphore(0), threading.Event()
            pushers = [PushingThread(server, f"{number} {client}", pushed, killing) for client in range(PUSHERS)]
            for pusher in pushers:
                pusher.start()
            for _ in range(2 + number):
                pushed.acquire(timeout=60)
        finally:
            killing.set()
            if number % 2:
                server.kill_parent()
            else:
                server.kill()
        for pusher in pushers:
            pusher.join()
            blobs += pusher.blobs
            if pusher.failure is not None:
                raise pusher.failure
        with running_server(tmp_path) as restarted_server:
            for pusher in pushers:
                _check(restarted_server, pusher)
    with running_server(tmp_path) as restarted_server:
        for body in blobs:
            assert pull(restarted_server, "team/app", body) == body
    assert len(blobs) >= ROUNDS * 2


def _check(server: RegistryServer, pusher: PushingThread) -> None:
    """Checks that a restarted server has the content that was acknowledged to this client."""
    for body in pusher.blobs:
        assert pull(server, "team/app", body) == body
    for tag, manifest in pusher.tags.items():
        assert ask(server, "GET", f"/v2/team/app/manifests/{tag}")[1] == manifest
    for location, acknowledged in pusher.offsets.items():
        body = pusher.sessions[location]
        status, _, headers = ask(server, "GET", location)
        if acknowledged == len(body) and status == 404:
            continue  # the closing request was running at the kill, and has completed the session
        assert status == 204
        offset = int(headers["range"].rpartition("-")[2]) + 1
        assert acknowledged <= offset <= len(body)
        joined = location + ("&" if "?" in location else "?")
        assert ask(server, "PUT", f"{joined}digest={digest_of(body)}", body[offset:])[0] == 201
        assert pull(server, "team/app", body) == body
