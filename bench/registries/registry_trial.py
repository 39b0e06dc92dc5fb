"""The content that the bench `registries` pushes to both servers, and the data that one trial needs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bench.loaders.http_client import HttpClient
from bench.random_content import (
    MIB,
    BlobContent,
    blob_from_file,
    make_config,
    make_manifest,
    push_content,
    small_layers,
    write_random,
)
from bench.system.docker_daemon import DockerDaemon
from bench.system.servers import RunningServer, ServerProgram

APP_REPO = "bench/app"
TAGS_REPO = "bench/tagged"
TAG_COUNT = 300
BULK_SIZE = 256 * MIB  # bytes
LAYER_COUNT = 6


class RegistryContent:
    """The content to push and to request, and other data that all trials of a run share."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        """`stack`: closed at the end of the run."""
        self.folder, self._stack = folder, stack
        self.api_tokens: dict[str, str] = {}
        """The API token of the account, by the name of the server that has this account."""
        self._layers = small_layers(LAYER_COUNT)
        self.small, self._config = self._layers[0], make_config(self._layers)
        self.bodies = [make_manifest(self._config, self._layers, note) for note in ("first", "second")]
        """Two manifests. PUTs move tags from one to the other; the tag `latest` points to the first."""
        self.manifest_files = [folder / "first.json", folder / "second.json"]
        for file, body in zip(self.manifest_files, self.bodies, strict=True):
            file.write_bytes(body)

    @cached_property
    def large(self) -> BlobContent:
        """The large blob that the trials download."""
        return blob_from_file(write_random(self.folder / "large", BULK_SIZE))

    @cached_property
    def upload_file(self) -> Path:
        """The large file that the trials push. A trial may change its content first."""
        return write_random(self.folder / "pushed", BULK_SIZE)

    @cached_property
    def docker(self) -> DockerDaemon:
        """A docker daemon that runs until the end of the run. Raises BenchFailed."""
        return self._stack.enter_context(DockerDaemon.running(self.folder / "docker"))

    def fill(self, server: RunningServer) -> None:
        """Pushes all content except the large blob. Raises TrialFailed."""
        with HttpClient(server.port) as client:
            push_content(client, APP_REPO, "latest", self._config, self._layers, "first")
            push_content(client, TAGS_REPO, "v000", self._config, self._layers, "first")
            for number in range(1, TAG_COUNT):
                client.put_manifest(TAGS_REPO, f"v{number:03d}", self.bodies[0])

    def fill_large(self, server: RunningServer) -> None:
        """Pushes the large blob and reads it back once to check its bytes. Raises TrialFailed."""
        with HttpClient(server.port) as client:
            client.push_blob(APP_REPO, self.large.digest, self.large.content)
            client.check_blob(APP_REPO, self.large.digest, self.large.size)


@dataclass(frozen=True)
class RegistryTrial:
    """One trial: the measurement of one row with one server in one round."""

    content: RegistryContent
    server: RunningServer
    seconds: float
    """The length of a trial, approximately."""
    round: int

    @property
    def program(self) -> ServerProgram:
        return self.server.program
