"""Rows of the table of the bench `registries` for large blobs, for small requests while large blobs are transferred,
and for `docker pull`."""

from __future__ import annotations

from functools import partial

from bench.loaders.curl_transfers import background_transfers, download_blob, stream_upload
from bench.loaders.http_client import HttpClient
from bench.random_content import GIB, MIB, make_config, make_unique, push_content, write_tar_layer
from bench.registries.registry_trial import APP_REPO, BULK_SIZE, RegistryTrial
from bench.registries.request_rows import latest_manifest, load_target
from bench.report.measurements import BULK, CPU_GIB, CPU_SECONDS, LOADER_GIB, P50, P99, RATE, SECONDS, SPEED, Sample
from bench.runner import Row
from bench.system.memory_prefault import prefault_memory
from bench.system.servers import HOST, Meter

BULK_FIGURES = (SPEED, CPU_GIB, LOADER_GIB)
PULL_COUNT = 4
"""Number of downloads that run in the background while manifests are requested."""
PUSH_REPO = "bench/pushed"
DOCKER_REPO = "bench/large"
DOCKER_LAYERS = 4


def _fill_large(trial: RegistryTrial) -> None:
    trial.content.fill_large(trial.server)


def _bulk_costs(meter: Meter, size: int) -> Sample:
    return {CPU_GIB.key: meter.cpu() * GIB / size, LOADER_GIB.key: meter.loader_cpu() * GIB / size}


def _pull_large(trial: RegistryTrial, *, parallel: int) -> Sample:
    """Downloads the large blob with `parallel` programs at the same time. Each program downloads it several times, so
    that all together take about as long as a trial."""
    large = trial.content.large
    times = max(1, round(trial.seconds / parallel))
    meter = Meter(trial.server)
    speed = download_blob(f"{trial.server.url}/v2/{APP_REPO}/blobs/{large.digest}", large.size, times, parallel)
    return {SPEED.key: speed, **_bulk_costs(meter, large.size * times * parallel)}


def _push_large(trial: RegistryTrial) -> Sample:
    """Sends POST, one streamed PATCH and PUT with new content, and measures all three."""
    content = make_unique(trial.content.upload_file)
    prefault_memory(GIB)  # right before the measurement: free memory goes back to the host in 1 to 2 s
    with HttpClient(trial.server.port) as client:
        meter = Meter(trial.server)
        location = client.start_upload(PUSH_REPO)
        location = stream_upload(trial.server.url + location, trial.content.upload_file)
        client.close_upload(location, content.digest)
        sample = {SPEED.key: content.size / MIB / meter.seconds(), **_bulk_costs(meter, content.size)}
        path = f"/v2/{PUSH_REPO}/blobs/{content.digest}"
        client.request("HEAD", path, headers={"Accept": "*/*"}, expect=200)
    return sample


def _prepare_beside_bulk(trial: RegistryTrial) -> None:
    _fill_large(trial)
    _ = trial.content.upload_file  # creates the file now, because writing it during a trial would slow down the trial


def _get_manifests_beside_bulk(trial: RegistryTrial) -> Sample:
    """Gets manifests by tag while four downloads and a push run in the background. Does not prefault memory: the host
    would take back unused memory during the trial, and this can stop the whole machine for 30 ms at a time."""
    content = trial.content
    transfers = background_transfers(trial.server, APP_REPO, content.large.digest, PULL_COUNT, content.upload_file)
    with transfers as moved_bytes:
        bytes_before, meter = moved_bytes(), Meter(trial.server)
        report = load_target(trial, latest_manifest, trial.seconds)
        speed = (moved_bytes() - bytes_before) / MIB / meter.seconds()
    return {P99.key: report.p99, P50.key: report.p50, RATE.key: report.rate, BULK.key: speed}


def _push_docker_image(trial: RegistryTrial) -> None:
    _ = trial.content.docker  # starts docker, so that a failure occurs before anything is pushed
    folder = trial.content.folder / "layers"
    folder.mkdir(exist_ok=True)
    layers = [write_tar_layer(folder, f"layer{number}", BULK_SIZE) for number in range(DOCKER_LAYERS)]
    with HttpClient(trial.server.port) as client:
        push_content(client, DOCKER_REPO, "latest", make_config(layers), layers)
    for file in folder.iterdir():
        file.unlink()


def _pull_with_docker(trial: RegistryTrial) -> Sample:
    """Measures the elapsed time of `docker pull`, most of which is docker's unpacking."""
    docker, name = trial.content.docker, f"{HOST}:{trial.server.port}/{DOCKER_REPO}:latest"
    meter = Meter(trial.server)
    docker("pull", "--quiet", name)
    sample = {SECONDS.key: meter.seconds(), CPU_SECONDS.key: meter.cpu()}
    docker("image", "inspect", name)
    docker("image", "rm", "--force", name)
    return sample


def transfer_rows() -> list[Row[RegistryTrial]]:
    """Returns the rows in the order in which they are measured."""
    return [
        Row("blob-256m", "blob of 256 MiB", BULK_FIGURES, partial(_pull_large, parallel=1), _fill_large),
        Row("blob-256m-x4", "blob of 256 MiB, 4 at once", BULK_FIGURES, partial(_pull_large, parallel=4), _fill_large),
        Row(
            "manifest-under-bulk",
            "manifest by tag beside 4 pulls, 1 push",
            (P99, P50, RATE, BULK),
            _get_manifests_beside_bulk,
            _prepare_beside_bulk,
        ),
        # Comes after the latency rows: the memory that this row frees goes back to the host, which costs CPU time.
        Row("push-256m", "push of 256 MiB", BULK_FIGURES, _push_large),
        Row(
            "docker-pull",
            "docker pull, 1 GiB in 4 layers",
            (SECONDS, CPU_SECONDS),
            _pull_with_docker,
            _push_docker_image,
            rounds=3,
        ),
    ]
