"""The scheduled warming: a server process repeatedly fetches the images that the settings name."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import apsw
import pytest

from registry.config.mirror_settings import WarmSettings
from registry.mirror.warm.schedule import warm_on_schedule
from registry.mirror.warm.warmer import Warmer, WarmResult
from registry.router import Destination
from storage.errors import ManifestUnknown, NameUnknown
from storage.names import ImageReference, RepositoryName, Tag
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import MirrorSite, MirrorWorker

INTERVAL = 0.01


def settings(*references: str, file: Path | None = None) -> WarmSettings:
    return WarmSettings(references=list(references), file=file, platforms=["all"], interval=INTERVAL)


@asynccontextmanager
async def warming(
    warm: WarmSettings, on_locate: Callable[[str], None] = lambda _: None, **workers: MirrorWorker
) -> AsyncIterator[None]:
    """Warms images. `workers`: for each name of an upstream, without its domain, the worker with its mirror. Other
    names are unknown. `on_locate`: called with this name before the mirror of an image is looked up."""

    async def locate(repo: RepositoryName) -> Destination:
        upstream, _, name = repo.partition("/")
        on_locate(upstream.partition(".")[0])
        if (worker := workers.get(upstream.partition(".")[0])) is None:
            raise NameUnknown()
        return Destination(worker.mirror, RepositoryName(f"docker.io/{name}"), upstream)

    store = next(iter(workers.values())).store
    async with warm_on_schedule(warm, locate, store.metadata.known_blobs, store.leases):
        yield


@pytest.fixture
async def worker(site: MirrorSite) -> AsyncIterator[MirrorWorker]:
    site.configure(tag_ttl=1)
    async with site.worker() as opened:
        yield opened


async def test_images_are_asked_about_in_each_round(site: MirrorSite, worker: MirrorWorker, tmp_path: Path) -> None:
    """The images in the settings are fetched, and the upstream is asked about their tags in each round. An image that
    is added to the file is fetched in the next round. An image of an unknown name stops no other."""
    for name in ("a", "b"):
        site.upstream.add_image(f"library/{name}", b"layer")
    file = tmp_path / "images.txt"
    file.write_text("unknown.example.com/app:1\n")
    async with warming(settings("quick.example.com/library/a:1", file=file), quick=worker):
        await wait_for_rounds(site, 3)
        file.write_text("quick.example.com/library/b:1\n")
        await wait_until_cached(worker, "ab")


async def test_upstream_that_does_not_answer_delays_no_other(
    site: MirrorSite, worker: MirrorWorker, tmp_path: Path
) -> None:
    """While many images of one upstream wait for its answer, the rounds of another upstream go on. The silent upstream
    gets no second round meanwhile. Its images are fetched when it answers again."""
    silent_site = MirrorSite(tmp_path / "silent")
    site.upstream.add_image("library/a", b"layer")
    names = "abcdefgh"
    for name in names:
        silent_site.upstream.add_image(f"library/{name}", b"layer")
    silent_site.upstream.faults.hold = asyncio.Event()
    async with silent_site.worker() as silent:
        references = [f"silent.example.com/library/{name}:1" for name in names]
        async with warming(settings(*references, "quick.example.com/library/a:1"), quick=worker, silent=silent):
            await wait_for_rounds(site, 3)
            assert silent_site.upstream.calls.total() < len(names)
            silent_site.upstream.faults.hold.set()
            await wait_until_cached(silent, names)


async def test_error_of_a_look_up_ends_no_running_round(
    site: MirrorSite,
    worker: MirrorWorker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The look-up of the upstreams fails once, because the database cannot be read, while the round of an upstream
    waits for its answer. The error is in the log. That round goes on, and the other upstream gets further rounds."""
    silent_site = MirrorSite(tmp_path / "silent")
    for name, upstream in (("a", site.upstream), ("b", silent_site.upstream)):
        upstream.add_image(f"library/{name}", b"layer")
    silent_site.upstream.faults.hold = asyncio.Event()
    warmed: Counter[str] = Counter()
    located: Counter[str] = Counter()

    class CountingWarmer(Warmer):
        async def warm(self, images: Sequence[ImageReference]) -> list[WarmResult]:
            warmed.update(image.repository.partition(".")[0] for image in images)
            return await super().warm(images)

    def fail_once(upstream: str) -> None:
        """Fails in the second look-up. The first call for the silent upstream is that of the first look-up, and the
        second one that of its only round."""
        located[upstream] += 1
        if upstream == "silent" and located["silent"] == 3:
            raise apsw.IOError("disk I/O error")

    monkeypatch.setattr("registry.mirror.warm.schedule.Warmer", CountingWarmer)
    async with silent_site.worker() as silent:
        references = ["quick.example.com/library/a:1", "silent.example.com/library/b:1"]
        async with warming(settings(*references), on_locate=fail_once, quick=worker, silent=silent):
            await wait_until(lambda: located["silent"] >= 3)
            rounds_before = warmed["quick"]
            await wait_until(lambda: warmed["quick"] > rounds_before + 2)
            assert warmed["silent"] == 1
            silent_site.upstream.faults.hold.set()
            await wait_until_cached(silent, "b")
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        "warming the mirror failed; the next round tries again"
    ]
    assert "disk I/O error" in caplog.text


async def wait_for_rounds(site: MirrorSite, count: int) -> None:
    """Waits until this number of rounds has asked the upstream about a cached tag. Moves the clock on meanwhile, so
    that the tag is not fresh any more."""

    def has_requests() -> bool:
        site.clock.now += 2
        return site.upstream.calls["head manifest"] >= count

    await wait_until(has_requests)


async def wait_until_cached(worker: MirrorWorker, names: str) -> None:
    """Waits until the tag `1` of each repository is cached. `names`: one letter for each repository."""
    async with asyncio.timeout(60):
        for name in names:
            while not await is_cached(worker, name):  # noqa: ASYNC110  the warming task does not signal the change
                await asyncio.sleep(0.001)


async def is_cached(worker: MirrorWorker, name: str) -> bool:
    try:
        await worker.store.resolve_manifest(RepositoryName(f"docker.io/library/{name}"), Tag("1"))
    except ManifestUnknown:
        return False
    return True
