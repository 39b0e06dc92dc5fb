"""What a row is, and the stage its trials are made on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from bench.errors import TrialFailed
from bench.loaders.http_client import HttpClient
from bench.random_content import (
    CONFIG_TYPE,
    MIB,
    SMALL_SIZE,
    BlobContent,
    blob_from_file,
    make_blob,
    make_manifest,
    write_random,
)
from bench.report.measurements import Figure, Sample
from bench.system.servers import RunningServer, ServerProgram

APP_REPO = "bench/app"
TAGS_REPO = "bench/tagged"
TAG_COUNT = 300
BULK_SIZE = 256 * MIB
LAYERS = 6


@dataclass
class TrialSetup:
    """What all trials share: where they may write, how long each may take, and the content both registries hold."""

    folder: Path
    seconds: float
    kinds: Sequence[ServerProgram]
    stack: contextlib.ExitStack
    """Ended with the run: what a row starts for its later trials goes on it."""
    bulk_size: int = BULK_SIZE
    small: BlobContent = field(init=False)
    layers: list[BlobContent] = field(init=False)
    config: BlobContent = field(init=False)
    manifests: tuple[Path, Path] = field(init=False)
    """Two of them, for tags that move."""

    def __post_init__(self) -> None:
        self.layers = [make_blob(os.urandom(SMALL_SIZE)) for _ in range(LAYERS)]
        self.small = self.layers[0]
        self.config = make_blob(json.dumps({"architecture": "amd64", "os": "linux"}).encode(), CONFIG_TYPE)
        first, second = self.folder / "first.json", self.folder / "second.json"
        first.write_bytes(make_manifest(self.config, self.layers, "first"))
        second.write_bytes(make_manifest(self.config, self.layers, "second"))
        self.manifests = first, second

    @property
    def body(self) -> bytes:
        """The manifest that `latest` points at."""
        return self.manifests[0].read_bytes()

    @cached_property
    def large(self) -> BlobContent:
        """The blob of the bulk pulls; made when it is first asked for."""
        return blob_from_file(write_random(self.folder / "large", self.bulk_size))

    @cached_property
    def pushed(self) -> Path:
        """What is pushed: a file that each push may change."""
        return write_random(self.folder / "pushed", self.bulk_size)

    def fill(self, server: RunningServer) -> None:
        """Pushes the small content."""
        with HttpClient(server.port) as client:
            for repo in (APP_REPO, TAGS_REPO):
                for each in (self.config, *self.layers):
                    client.push_blob(repo, each.digest, each.content)
            client.put_manifest(APP_REPO, "latest", self.body)
            for number in range(TAG_COUNT):
                client.put_manifest(TAGS_REPO, f"v{number:03d}", self.body)

    def fill_large(self, server: RunningServer) -> None:
        """Pushes the large blob, and reads it back once to see that its bytes are right."""
        with HttpClient(server.port) as client:
            client.push_blob(APP_REPO, self.large.digest, self.large.content)
            if client.blob_digest(APP_REPO, self.large.digest) != (self.large.digest, self.large.size):
                raise TrialFailed(f"{server.name} gave other bytes than were pushed")


class Row(Protocol):
    """A line, or a few, of the table."""

    name: str
    """For `--only`."""
    title: str
    figures: tuple[Figure, ...]
    rounds: int | None
    """The most rounds that are worth their time; None: as many as asked for."""

    def prepare(self, stage: TrialSetup, server: RunningServer) -> None:
        """Once for each server, before the first round. Raises TrialFailed."""
        ...

    def trial(self, stage: TrialSetup, server: RunningServer, number: int) -> Sample:
        """Round `number` against one server. Raises TrialFailed."""
        ...
