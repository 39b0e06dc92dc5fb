"""`BackgroundWork`: the work that a server process does in the background, while it answers requests.

There are these kinds of work:

- queueing jobs that are due, and running queued jobs
- storing the pulls that the process has served, and the numbers of pulls, pushes and mirrored requests
- counting the space that repositories and caches use
- updating the search index
- evicting cached images, and fetching images before clients request them
- asking the upstreams about mirrored tags that are in a cooldown
- sending events to webhooks
- collecting garbage

The *cooldown* of a tag is a period that begins when the tag moves to another digest at the upstream. In this period,
the mirror still serves the older digest.

Most kinds of work have a lease (a lock across processes). Only the process that holds the lease does this kind of work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final

from registry.config import Settings
from registry.events.attempts import DeliveryObserver
from registry.events.delivery_leader import EventDelivery
from registry.events.pull_events import PullEvents
from registry.router import Router
from registry.telemetry.activity import ActivityCounts
from registry.telemetry.activity_recorder import ActivityRecorder
from registry.upkeep.budgets import scope_definitions
from registry.upkeep.components import UpkeepComponents
from registry.upkeep.retention import retention_work
from registry.upkeep.scrub_job import scrub_on_schedule
from storage.names import Digest, RepositoryName
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import JobRunner, OnJobEnded, ignore_job_end
from storage.upkeep.job_schedule import queue_jobs
from storage.upkeep.pull_recorder import PullRecorder
from storage.upkeep.schedule import cancel_all
from storage.upkeep.search_indexing import SearchIndexer, keep_indexed
from storage.upkeep.usage_counting import configure_and_count_with_retries

if TYPE_CHECKING:
    from registry.mirror.mirror import Mirror

_BUSY_CHECK_SECONDS: Final = 0.2
"""Time between two checks whether a mirror is still downloading."""
log = logging.getLogger("registry")


class BackgroundWork:
    """The background work of one process, with one set of settings. `start` has an effect only once. To end the work:

    - If another application or process takes over the work, call `hand_over`, `finish` and `aclose`, in this order.
    - If the process must end soon, call only `aclose`."""

    def __init__(
        self,
        settings: Settings,
        store: StoredRegistry,
        router: Router,
        mirrors: Mapping[str, Mirror],
        upkeep: UpkeepComponents,
        pulls: PullRecorder,
        pull_events: PullEvents | None,
        clock: Callable[[], float],
        delivery_observer: DeliveryObserver | None = None,
        activity: ActivityCounts | None = None,
        on_job_ended: OnJobEnded = ignore_job_end,
    ) -> None:
        """`pull_events`: makes an event of each pull; None: the settings ask for no events of pulls.
        `delivery_observer`: counts the deliveries to webhooks; None: deliveries are not counted. `activity`: the
        numbers of pulls, pushes and mirrored requests; None: these numbers are not stored. `on_job_ended`: called at
        the end of each job."""
        self._settings = settings
        self._store = store
        self._router = router
        self._mirrors = mirrors
        self._upkeep = upkeep
        self._pulls = pulls
        self._pull_events = pull_events
        self._clock = clock
        self._runner = JobRunner(store.jobs, store.leases, upkeep.work_by_kind, on_job_ended)
        self._delivery = EventDelivery(store.outbox, store.leases, store.metadata.version, clock, delivery_observer)
        self._activity = None if activity is None else ActivityRecorder(store.activity, store.leases, activity, clock)
        self._is_started = False
        self._tasks: list[asyncio.Task[None]] = []  # the job runner and the recorders of pulls
        self._schedules: list[asyncio.Task[None]] = []  # tasks that depend on the settings; `hand_over` ends them
        self._mirror_tasks = AsyncExitStack()  # ends the tasks that `_start_mirror_tasks` has started

    async def start(self) -> None:
        """Starts the work. Does nothing if the work was started already. Also does nothing if the store was opened
        read-only, for these reasons:

        - On a read-only store, the work could store nothing.
        - The work would hold leases. After the store has been opened again for writing, a new `BackgroundWork` needs
          these leases."""
        if self._store.is_read_only or self._is_started:
            return
        self._is_started = True
        if self._mirrors:
            await self._start_mirror_tasks()
        settings, store = self._settings, self._store
        await self._delivery.apply(settings)
        recorders = [self._pulls.run()] if self._pull_events is None else [self._pulls.run(), self._pull_events.run()]
        self._tasks = [asyncio.create_task(work) for work in (self._runner.run(), *recorders)]
        schedules = [
            *self._job_schedules(),
            # A scope is a set of repositories whose space is counted, such as the repositories of one quota.
            configure_and_count_with_retries(store.usage, store.leases, scope_definitions(settings)),
            keep_indexed(search_indexer(settings, store), store.leases),
        ]
        if self._activity is not None:
            schedules.append(self._activity.run())
        # `run_upkeep_rounds` is None if this process runs no rounds. A round collects garbage, and deletes old lines of
        # the audit log and the old history of mirrored tags.
        if store.run_upkeep_rounds is not None:
            schedules.append(store.run_upkeep_rounds())
        if self._upkeep.evictor.limits:
            store.metadata.on_mirrored = self._upkeep.evictor.check_soon
            schedules.append(self._upkeep.evictor.run())
        if settings.scrub.every:
            schedules.append(scrub_on_schedule(settings.scrub, store, self._clock))
        self._schedules = [asyncio.create_task(work) for work in schedules]

    async def hand_over(self) -> None:
        """Stops the tasks that depend on the settings, and starts no further job, because another application or
        process takes over. Running jobs and downloads continue. May be called repeatedly."""
        self._runner.stop_starting_jobs()
        schedules, self._schedules = self._schedules, []
        await cancel_all(schedules)
        await self._delivery.aclose()
        await self._mirror_tasks.aclose()

    async def finish(self) -> None:
        """Waits until the running jobs and downloads have ended. A job can take hours. Call `hand_over` first."""
        await self._runner.wait_until_idle()
        for mirror in self._mirrors.values():
            while mirror.is_busy:  # noqa: ASYNC110 - a mirror's work has no single event for its end
                await asyncio.sleep(_BUSY_CHECK_SECONDS)

    async def aclose(self) -> None:
        """Ends all work. Another process continues the jobs that can be resumed. Stores the pulls of the last seconds,
        even if the work was never started: the application answers requests before it calls `start`. If the work was
        started, also stores the last numbers of pulls, pushes and mirrored requests."""
        if self._is_started:
            await self.hand_over()
            tasks, self._tasks = self._tasks, []
            await cancel_all(tasks)
        for recorder, recorded in ((self._pulls, "pulls"), (self._pull_events, "events of pulls")):
            if recorder is not None:
                try:
                    await recorder.store()
                except Exception as error:  # the other recorder must still store its pulls
                    log.warning("the %s of the last seconds are lost: %s", recorded, error)
        if self._activity is not None and self._is_started:
            await self._activity.store_last()

    async def _start_mirror_tasks(self) -> None:
        """Starts the tasks that fetch images before clients request them, and the tasks that ask the upstreams about
        tags in a cooldown."""
        from registry.mirror.warm.schedule import warm_on_schedule

        settings, leases = self._settings, self._store.leases
        await self._mirror_tasks.enter_async_context(
            warm_on_schedule(settings.warm, self._router.locate, self._store.metadata.known_blobs, leases)
        )
        if cooldowns := {upstream.name: upstream.cooldown for upstream in settings.upstream if upstream.cooldown}:
            from registry.mirror.cooldown_watch import round_interval, watch_young_tags

            watched = [self._mirrors[name] for name in cooldowns]
            interval = round_interval(cooldowns.values())
            await self._mirror_tasks.enter_async_context(watch_young_tags(watched, interval, leases))

    def _job_schedules(self) -> list[Coroutine[Any, Any, None]]:
        """Returns coroutines that queue jobs at the intervals in the settings."""
        settings, store = self._settings, self._store
        if not settings.retention or not settings.upkeep.retention_every or settings.read_only:
            return []
        every, actor = settings.upkeep.retention_every, retention_work.ACTOR.name
        return [queue_jobs(store.jobs, store.leases, retention_work.KIND, every, self._clock, actor=actor)]


def search_indexer(settings: Settings, store: StoredRegistry) -> SearchIndexer:
    """Returns the object that keeps the search index up to date. The index contains labels of image configs.

    A *private* upstream may have repositories that only some clients may read. For a repository of a private upstream,
    the indexer does not read a config until the upstream has confirmed that the repository has this config. Clients
    cannot pull the config before that, so they must not find its labels."""
    private = {upstream.name for upstream in settings.upstream if upstream.has_private_repositories}

    async def may_read(repo: RepositoryName, digest: Digest) -> bool:
        # The name of a mirrored repository begins with the name of its upstream.
        return repo.partition("/")[0] not in private or await store.records.is_confirmed(repo, digest)

    return SearchIndexer(store.search_index, store.metadata, store.blobs, may_read)
