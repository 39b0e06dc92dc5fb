"""`ServiceFactory` builds the `Service` of a worker process from the settings: the objects that answer requests.

A request for `/v2` passes through these layers, in this order:

1. the distribution API, which parses the request and makes a call on a registry;
2. `Observed`, which measures and logs the call;
3. `Guarded`, which checks the client's rights;
4. `Restricted`, which refuses calls that the settings `read_only` and `delete` forbid;
5. `Admission`, which refuses pushes whose content does not fit; only if the settings limit the space;
6. the router, which passes the call to the store or to a mirror; without mirrors, only the store.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

from registry.admin.caller import ManagementComponents
from registry.admin.content_searches import ContentSearches
from registry.admin.management_api import management_components
from registry.auth.assembly import AuthComponents, open_auth_components
from registry.auth.authenticators import HeaderAuthenticator, OpenAuthenticator
from registry.auth.rights.guard import Guarded, OnDenied
from registry.auth.rights.policy import Policy
from registry.auth.rights.principal import Principal
from registry.auth.token_service.service import TokenService
from registry.backend import Backend, open_backend
from registry.background_work import BackgroundWork
from registry.browse.repository_browser import RepositoryBrowser
from registry.browse.stored_content import stored_content_router
from registry.config import Settings
from registry.config.auth_settings import token_service_name
from registry.http import Authenticator, DistributionAPI, Namespaces, RequestLimits
from registry.http.answer_cache import AnswerCache
from registry.http.body_memory import MANIFESTS_BUDGET_BYTES, RESPONSES_BUDGET_BYTES, SLOW_CLIENT_SECONDS, BodyMemory
from registry.http.cross_site import CrossSiteCheck
from registry.http.exchange import CountPull
from registry.http.extensions import ReadHistory, refuse_history
from registry.http.namespaces import hosts_of
from registry.http.rate_limit import HEALTH_KEY_PREFIX, RateLimit
from registry.memory_budget import MemoryBudget
from registry.naming import NamingRules
from registry.observe import Observed
from registry.request import GetPushRefusalReason, current_request
from registry.restrict import restrict
from registry.router import Router
from registry.server.shared_counters import SharedRateLimiter, allocate_limiter_cells
from registry.status.readiness import Readiness
from registry.status.worker_report import ReadEndpointHealth
from registry.telemetry.telemetry import Telemetry
from registry.ui.pages import PageComponents
from registry.upkeep.admission import Admission
from registry.upkeep.budgets import min_free_space
from storage.access import Action
from storage.content import Page, Pull
from storage.interface import Registry
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.tag_history import TagChange

MIN_HEALTH_CHECKS_PER_SECOND: Final = 20.0
"""The clients of one IPv4 address or one IPv6 /64 network may together send at least this many health checks a second,
even if the rate limit in the settings is lower."""


@dataclass(frozen=True, slots=True)
class AccessControl:
    """The objects that only a service with accounts has. `components`: the stores and caches of accounts and
    credentials. `policy` computes the rights of clients. `tokens` issues tokens. `management`: the objects that the
    management API uses."""

    components: AuthComponents
    policy: Policy
    tokens: TokenService
    management: ManagementComponents


@dataclass(frozen=True, slots=True)
class Service:
    """The objects with which a worker answers requests.

    - `distribution` answers requests for `/v2`.
    - `unchecked_registry`: the registry without the check of the client's rights. Health checks use it.
    - `readiness` says whether the service can serve.
    - `access`: the objects for accounts; None if the service cannot have accounts.
    - `storage_problem` returns a sentence that says why nothing can be stored now; returns None if no problem is known.
    - `is_store_read_only`: whether the store was opened only for reading, because the disk was too full for writing.
    - `work`: the background work; None if there is none.
    - `retire_read_only_store` must be called after another service has replaced this one. It closes a store that was
      opened only for reading: every later call on the store raises StorageFull. For any other store, it does nothing.
    - `endpoint_health` returns the health of the endpoints (URLs) of each upstream, by the upstream's name, as this
      process has observed it.
    - `pages`: the objects that the web pages need; None if the service has no web pages."""

    distribution: DistributionAPI
    unchecked_registry: Registry
    readiness: Readiness
    access: AccessControl | None = None
    storage_problem: Callable[[], str | None] = lambda: None
    retire_read_only_store: Callable[[], None] = lambda: None
    is_store_read_only: bool = False
    work: BackgroundWork | None = None
    endpoint_health: ReadEndpointHealth = dict
    pages: PageComponents | None = None


class ServiceFactory:
    """Builds the services of one worker. If the first service opened its store only for reading, a second service with
    a writable store replaces it.

    `rate_limit`: the rate limit that all workers share (`shared_rate_limit`); None: no limit. `telemetry` counts the
    work of the service; None: nothing is counted. `clock` returns seconds since 1970."""

    def __init__(
        self,
        settings: Settings,
        *,
        rate_limit: RateLimit | None = None,
        telemetry: Telemetry | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self.telemetry = telemetry
        self.rate_limit = rate_limit
        self.clock = clock
        self.body_memory = _body_memory(settings)
        # A client can pull from these upstreams only with a grant whose name pattern begins with the upstream's name.
        self._upstreams_needing_grant = [
            upstream.name for upstream in settings.upstream if upstream.needs_upstream_grant
        ]
        self._upstream_by_host = {host: upstream.name for upstream in settings.upstream for host in upstream.hosts}
        self._other_hosts = [*self._upstream_by_host, *settings.host_names]
        """The names of this server, except the host of `public_url`: the settings `host_names` and `upstream.hosts`."""

    def without_accounts(self, registry: Registry) -> Service:
        """Returns a service that cannot have accounts. Every client may do everything with `registry`, with one
        exception: no client may use the repositories of upstreams that need a grant (a permission from an
        administrator)."""
        restricted = self._restrict(registry)
        guard = Guarded(restricted)
        authenticator = OpenAuthenticator(guard, guarded_upstreams=self._upstreams_needing_grant)
        # `lambda: True`: there are no accounts. `CrossSiteCheck` then refuses a request of a browser on this machine if
        # the Host header is no known name of the registry, because DNS rebinding may have caused the request.
        cross_site = CrossSiteCheck(self.settings.public_url, self._other_hosts, lambda: True)
        return Service(
            self._distribution(guard, authenticator, cross_site),
            unchecked_registry=restricted,
            readiness=Readiness(restricted),
        )

    @asynccontextmanager
    async def open(self, *, may_open_read_only: bool, starts_background_work: bool = True) -> AsyncIterator[Service]:
        """Context manager that opens the store, the mirrors and the accounts, and yields the service that uses them.

        - `may_open_read_only`: what happens if the disk is too full to open the store for writing. True: the store is
          opened only for reading. False: raises StorageFull. The setting `read_only` is independent of this parameter.
          With the setting `read_only`, the registry refuses changes by clients and collects no garbage, but mirrors
          still cache new content.
        - `starts_background_work`: False if the caller starts the background work (`Service.work`)."""
        settings = self.settings
        collect_every = None if settings.read_only else settings.gc.interval
        async with (
            open_backend(
                settings,
                collect_every=collect_every,
                is_server=True,
                starts_background_work=starts_background_work,
                may_open_read_only=may_open_read_only,
                clock=self.clock,
                telemetry=self.telemetry,
            ) as backend,
            open_auth_components(
                settings,
                backend.store.accounts,
                backend.store.leases,
                clock=self.clock,
                on_login=(lambda *_: None) if self.telemetry is None else self.telemetry.work.on_login,
            ) as components,
        ):
            yield self._with_accounts(backend, components)

    def _with_accounts(self, backend: Backend, components: AuthComponents) -> Service:
        """Returns the service of an opened backend, with accounts."""
        settings, store, router = self.settings, backend.store, backend.router
        policy = Policy.from_settings(settings, components.accounts, components.revocation_check)
        # Without mirrors, the router would only pass each call on to the store.
        restricted = self._restrict(self._with_admission(router if router.mirrors else store, store))
        guard = Guarded(
            restricted,
            router.naming,
            router.stored_name,
            on_denied=_denial_recorder(components, self.telemetry),
            renew=policy.reevaluate,  # the client's rights may change while the body of its push is received
            cursors=components.cursors,  # encrypts the cursors in lists of repositories
        )
        authenticator = HeaderAuthenticator(guard, policy, components.credential_verifier, clock=components.clock)
        # `is_always_hosted` returns True for a repository whose content never comes from a mirror. `by_host`: whether
        # the same path can name different repositories at different hosts of this server.
        answer_cache = AnswerCache(
            store.metadata.version, router.is_always_hosted, by_host=bool(self._upstream_by_host)
        )
        stored_router = stored_content_router(
            store,
            router.naming,
            store.is_known_repository,
            private=[upstream.name for upstream in settings.upstream if upstream.has_private_repositories],
            # The router returns a blob from a repository of a private upstream only if this function returns True: the
            # upstream has confirmed that the repository has the blob.
            is_confirmed=store.records.is_confirmed,
        )
        # `RepositoryBrowser` reads stored content through `browser_guard`. It removes tags and makes archives through
        # `guard`. An archive may need content that only an upstream has.
        browser_guard = Guarded(stored_router, router.naming, stored_router.stored_name, renew=policy.reevaluate)
        browser = RepositoryBrowser(browser_guard, guard, store)
        behind_proxy = settings.public_url is not None or bool(settings.trusted_proxies)
        # The lambda: True while no client needs a login. The check of host names (see `without_accounts`) then applies.
        cross_site = CrossSiteCheck(settings.public_url, self._other_hosts, lambda: not policy.is_closed)
        management = management_components(
            *(components, policy, backend.upkeep, browser, ContentSearches(store, router, backend.upstream_search)),
            cross_site,
            is_proxied=behind_proxy,
            public_url=settings.public_url,
        )
        return Service(
            self._distribution(
                guard,
                authenticator,
                cross_site,
                answer_cache,
                count_pull=_pull_counter(backend),
                # With the setting `read_only`, `Restricted` refuses every push, so the space need not be checked.
                push_refusal_reason=None if settings.read_only else store.push_refusal_reason,
                read_history=_history_reader(guard, store),
            ),
            unchecked_registry=restricted,
            readiness=Readiness(restricted, store, settings.data),
            access=AccessControl(components, policy, components.token_service(policy), management),
            storage_problem=store.storage_problem,
            retire_read_only_store=store.retire,
            is_store_read_only=store.is_read_only,
            work=backend.work,
            endpoint_health=lambda: {name: mirror.endpoint_health for name, mirror in backend.mirrors.items()},
            pages=PageComponents(self._page_content(stored_router, components), router.naming, cross_site),
        )

    def _page_content(self, stored_router: Router, components: AuthComponents) -> Observed:
        """Returns the registry that the web pages read: `stored_router`, with a check of the visitor's rights. This
        registry refuses all changes. It asks no upstream, so that no page waits for an upstream or uses up its rate
        limit."""
        guard = Guarded(
            restrict(stored_router, read_only=True, delete=False),
            stored_router.naming,
            stored_router.stored_name,
            on_denied=_denial_recorder(components, self.telemetry),
            cursors=components.cursors,
        )
        return self._observe(guard)

    def _with_admission(self, registry: Registry, store: StoredRegistry) -> Registry:
        """Returns `registry` with a check that the content of each push fits. Returns `registry` unchanged if the
        settings have neither a quota nor a minimum of free disk space."""
        if not self.settings.quota and min_free_space(self.settings) is None:
            return registry
        return Admission(registry, store.push_refusal_reason, store.usage.check_quota if self.settings.quota else None)

    def _restrict(self, registry: Registry) -> Registry:
        """Returns `registry` with the settings `read_only` and `delete` applied."""
        return restrict(registry, read_only=self.settings.read_only, delete=self.settings.delete)

    def _distribution(
        self,
        guard: Guarded,
        authenticator: Authenticator,
        cross_site: CrossSiteCheck,
        answer_cache: AnswerCache | None = None,
        count_pull: CountPull | None = None,
        push_refusal_reason: GetPushRefusalReason | None = None,
        read_history: ReadHistory = refuse_history,
    ) -> DistributionAPI:
        """Returns the distribution API over `guard`.

        - `cross_site` refuses requests that web pages of other sites send.
        - `answer_cache`: the cache of responses; None: no response is cached.
        - `count_pull` counts the pulls of manifests; None: they are not counted.
        - `push_refusal_reason` returns why a manifest of a given size does not fit on the disk, or None if it fits. It
          is called before the manifest is received. If the parameter itself is None, this check is left out.
        - `read_history` reads the history of a tag for the current request."""
        settings = self.settings
        return DistributionAPI(
            self._observe(guard),
            limits=RequestLimits(manifest_bytes=settings.limits.manifest),
            public_url=settings.public_url,
            namespaces=self._namespaces(),
            rate_limit=self.rate_limit,
            authenticator=authenticator,
            service=token_service_name(settings.auth, settings.public_url),
            answer_cache=answer_cache,
            cross_site=cross_site,
            body_memory=self.body_memory,
            count_pull=count_pull,
            push_refusal_reason=push_refusal_reason,
            read_history=read_history,
        )

    def _observe(self, guard: Guarded) -> Observed:
        """Returns a wrapper of `guard` that measures the calls, and traces them if the settings configure traces."""
        if self.telemetry is None:
            return Observed(guard)
        tracing = self.telemetry.tracing
        return Observed(guard, self.telemetry.work.on_call, None if tracing is None else tracing.trace_call)

    def _namespaces(self) -> Namespaces | None:
        """Returns the upstreams that a request can name with its parameter `ns` or its host; None if there are none."""
        upstreams = self.settings.upstream
        if not upstreams:
            return None
        return Namespaces(
            NamingRules.from_settings(self.settings),
            upstream_by_host=self._upstream_by_host,
            own_hosts=hosts_of(self.settings.public_url) | set(self.settings.host_names),
            upstream_by_alias={alias: upstream.name for upstream in upstreams for alias in upstream.aliases},
        )


class RateLimitMemory:
    """The memory in which all workers count requests. It must be created before the workers are forked. If the rate
    limit in the settings changes, the new rate limit uses the same memory."""

    def __init__(self) -> None:
        self.requests = allocate_limiter_cells()
        self.health_checks = allocate_limiter_cells()


def shared_rate_limit(settings: Settings, memory: RateLimitMemory | None = None) -> RateLimit | None:
    """Returns the rate limit in the settings. It counts the requests of all workers in `memory`. Returns None if the
    settings have no rate limit. If `memory` is None, allocates memory, and must be called before the workers are
    forked. Health checks have a limit of their own: the same rate, but at least `MIN_HEALTH_CHECKS_PER_SECOND`."""
    per_second = settings.limits.requests_per_second
    if not per_second:
        return None
    # By default, a client may send as many requests at once as the rate allows in ten seconds.
    burst = settings.limits.burst or max(1, round(10 * per_second))
    memory = memory or RateLimitMemory()
    requests = SharedRateLimiter(per_second, burst, cells=memory.requests)
    health_per_second = max(per_second, MIN_HEALTH_CHECKS_PER_SECOND)
    health = SharedRateLimiter(health_per_second, round(10 * health_per_second), cells=memory.health_checks)

    def count_request(key: str) -> float:  # returns 0, or the seconds until a request of `key` is within the rate
        return (health if key.startswith(HEALTH_KEY_PREFIX) else requests).take(key)

    return count_request


def _body_memory(settings: Settings) -> BodyMemory:
    """Returns the memory budgets of a worker. Each budget is large enough for two manifests of the largest size in the
    settings."""
    min_bytes = 2 * settings.limits.manifest
    return BodyMemory(
        manifests=MemoryBudget(max(MANIFESTS_BUDGET_BYTES, min_bytes), "request bodies"),
        responses=MemoryBudget(max(RESPONSES_BUDGET_BYTES, min_bytes), "answers", slow_seconds=SLOW_CLIENT_SECONDS),
    )


def _pull_counter(backend: Backend) -> CountPull:
    """Returns the function that is called for each pull of a manifest."""
    count, events = backend.pulls.count, backend.pull_events
    if events is None:
        return lambda pull, _name, _address, _request_id: count(pull)
    add_event = events.add

    def count_pull(pull: Pull, name: str, address: str, request_id: str) -> None:
        count(pull)
        add_event(pull, name, address, request_id)

    return count_pull


def _history_reader(guard: Guarded, store: StoredRegistry) -> ReadHistory:
    """Returns a function that reads the history of a tag, after `guard` has checked the client's right to pull."""

    async def read(repo: RepositoryName, tag: Tag, before: int | None, limit: int) -> Page[TagChange]:
        return await store.tag_history.changes(await guard.readable_name(repo), tag, before, limit)

    return read


def _denial_recorder(components: AuthComponents, telemetry: Telemetry | None) -> OnDenied:
    """Returns the function that `Guarded` calls when it refuses an action to an account. The function counts the
    refusal, and adds an entry about it to the audit log."""

    def record_denial(principal: Principal, action: Action, name: str) -> None:
        if telemetry is not None:
            telemetry.work.on_denied(action.words)
        actor = replace(current_request().actor, name=principal.name)
        components.audit_buffer.record(actor, ",".join(action.words), name, "denied")

    return record_denial
