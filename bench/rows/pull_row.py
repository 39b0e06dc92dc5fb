"""A real docker pulls a large image."""

from __future__ import annotations

import time

from bench.content import MIB, config, manifest, write_layer
from bench.dockerd import Docker
from bench.figures import CPU_SECONDS, SECONDS, Figure, Sample
from bench.rows.row import Stage
from bench.servers import Server
from bench.wire import HOST, Client

REPO = "bench/large"
LAYERS = 4
LAYER_SIZE = 256 * MIB


class DockerPull:
    """Wall-clock time of `docker pull`; docker unpacks meanwhile, which takes most of it."""

    name = "docker-pull"
    title = "docker pull, 1 GiB in 4 layers"
    figures: tuple[Figure, ...] = (SECONDS, CPU_SECONDS)
    rounds: int | None = 3

    def __init__(self, layer_size: int = LAYER_SIZE) -> None:
        self._layer_size = layer_size
        self._docker: Docker | None = None

    def prepare(self, stage: Stage, server: Server) -> None:
        if self._docker is None:
            self._docker = stage.stack.enter_context(Docker.running(stage.folder / "docker"))
        folder = stage.folder / "layers"
        folder.mkdir(exist_ok=True)
        layers = [write_layer(folder, f"layer{number}", self._layer_size) for number in range(LAYERS)]
        described = config(layers)
        with Client(server.port) as client:
            for each in (described, *layers):
                client.push_blob(REPO, each.digest, each.content)
            client.put_manifest(REPO, "latest", manifest(described, layers))
        for layer in folder.iterdir():
            layer.unlink()

    def trial(self, stage: Stage, server: Server, number: int) -> Sample:
        assert self._docker is not None
        name = f"{HOST}:{server.port}/{REPO}:latest"
        before, begun = server.cpu(), time.perf_counter()
        self._docker("pull", "--quiet", name)
        sample = {SECONDS.key: time.perf_counter() - begun, CPU_SECONDS.key: server.cpu() - before}
        self._docker("image", "inspect", name)
        self._docker("image", "rm", "--force", name)
        return sample
