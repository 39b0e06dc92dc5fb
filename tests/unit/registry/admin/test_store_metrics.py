"""The metrics of the store, such as the number of manifests. The tests check how often they are read, and what is
exposed if the store cannot be read."""

from __future__ import annotations

from pathlib import Path

from registry.admin.store_metrics import MIN_CACHED_READ_DURATIONS, MIN_CACHED_SECONDS, StoreMetrics
from registry.config import Settings
from storage.composition import open_registry, prepare_data_dir
from storage.names import RepositoryName
from storage.outbox import CHANGE_ACTIONS, EventReader, FailedDelivery
from tests.fakes.registry_content import push_image
from tests.fakes.upkeep_store import Clock

APP = RepositoryName("team/app")


def unlabelled_values(metrics: StoreMetrics) -> dict[str, float]:
    """Returns the values of all samples without labels, by name."""
    return {sample.name: sample.value for metric in metrics.collect() for sample in metric.samples if not sample.labels}


async def test_values_are_cached_for_some_time(tmp_path: Path) -> None:
    """A scrape uses the values of an earlier scrape for `MIN_CACHED_SECONDS`. After that, they are read again."""
    prepare_data_dir(tmp_path)
    now = 0.0
    metrics = StoreMetrics(Settings(data=tmp_path), monotonic=lambda: now)
    assert unlabelled_values(metrics)["entrepot_manifests"] == 0
    async with open_registry(tmp_path) as registry:
        await push_image(registry, APP, "x", "latest")
    now = MIN_CACHED_SECONDS - 0.1
    assert unlabelled_values(metrics)["entrepot_manifests"] == 0
    now = MIN_CACHED_SECONDS
    current_values = unlabelled_values(metrics)
    assert (
        current_values["entrepot_manifests"],
        current_values["entrepot_tags"],
        current_values["entrepot_repositories"],
    ) == (1, 1, 1)
    assert current_values["entrepot_blobs"] == 2
    assert current_values["entrepot_blob_bytes"] > 0


async def test_values_that_take_long_to_read_are_cached_longer(tmp_path: Path) -> None:
    """If reading the values takes long, they are cached for longer: for `MIN_CACHED_READ_DURATIONS` times the
    duration of the read. So reads take only a small part of the time."""
    prepare_data_dir(tmp_path)
    # The first read takes ten seconds. The next scrapes come one second before the values expire, and when they expire.
    read_seconds = 10.0
    expiry = read_seconds + MIN_CACHED_READ_DURATIONS * read_seconds
    times = iter([0.0, read_seconds, expiry - 1, expiry, expiry])
    metrics = StoreMetrics(Settings(data=tmp_path), monotonic=lambda: next(times))
    assert unlabelled_values(metrics)["entrepot_manifests"] == 0
    async with open_registry(tmp_path) as registry:
        await push_image(registry, APP, "x", "latest")
    assert unlabelled_values(metrics)["entrepot_manifests"] == 0
    assert unlabelled_values(metrics)["entrepot_manifests"] == 1


def test_a_store_that_cannot_be_read(tmp_path: Path) -> None:
    """If the store cannot be read, the only metric of the store states this."""
    assert unlabelled_values(StoreMetrics(Settings(data=tmp_path / "missing"))) == {"entrepot_store_readable": 0}


async def test_backlog_of_webhooks(tmp_path: Path) -> None:
    """Each webhook in the settings has metrics for its pending events, for its dead letters (deliveries that were given
    up) and for the age of its oldest pending event. All of them are 0 if there are none."""
    prepare_data_dir(tmp_path)
    clock = Clock()
    webhooks = [{"name": name, "url": "http://hook.test"} for name in ("slow", "idle")]
    metrics = StoreMetrics(Settings(data=tmp_path, webhook=webhooks), clock)  # type: ignore[arg-type]
    async with open_registry(tmp_path, clock=clock) as registry:
        await registry.outbox.configure([EventReader("slow", CHANGE_ACTIONS, ("**",))])
        for tag in ("v1", "v2", "v3"):
            await push_image(registry, APP, "x", tag)
        await registry.outbox.settle("slow", [], [FailedDelivery(1, 10, 0.0, clock.now, "no")])
        clock.now += 7
    current_values = {
        (sample.name.removeprefix("entrepot_events_"), sample.labels["webhook"]): sample.value
        for metric in metrics.collect()
        for sample in metric.samples
        if sample.name.startswith("entrepot_events_")
    }
    assert current_values == {
        ("pending", "slow"): 2,
        ("dead_letters", "slow"): 1,
        ("oldest_pending_age_seconds", "slow"): 7,
        ("pending", "idle"): 0,
        ("dead_letters", "idle"): 0,
        ("oldest_pending_age_seconds", "idle"): 0,
    }
