"""`ServiceFactory`: builds the service of a worker process from the settings (the composition root).

A request passes through these layers, from the outside: the distribution API (HTTP), the log of calls (`Observed`), the
check of the caller's rights (`Guarded`), the restrictions in the settings (`Restricted`), and the router over the store
and the mirrors, or the store alone.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

from registry.admin.caller import ManagementComponents
from registry.admin.management_api import management_components
from registry.auth.assembly import AuthComponents, open_auth_components
from registry.auth.authenticators import HeaderAuthenticator, OpenAuthenticator
from registry.auth.rights.guard import Guarded, OnDenied
from registry.auth.rights.policy import Policy
from registry.auth.rights.principal import Principal
from registry.auth.token_service.service import TokenService
from registry.backend import Backend, open_backend
from registry.config import Settings
from registry.config.auth_settings import has_external_logins, token_service_name
from registry.http import Authenticator, DistributionAPI, Namespaces, RequestLimits
from registry.http.answer_cache import AnswerCache
from registry.http.body_memory import ANSWER_BYTES, REQUEST_BODY_BYTES, SLOW_CLIENT_SECONDS, BodyMemory
from registry.http.cross_site import CrossSiteCheck
from registry.http.namespaces import hosts_of
from registry.http.rate_limit import HEALTH_KEY, RateLimit
from registry.memory_budget import MemoryBudget
from registry.naming import NamingRules
from registry.observe import Observed
from registry.request import current_request
from registry.restrict import restrict
from registry.server.shared_counters import SharedRateLimiter
from storage.access import Action
from storage.interface import Registry

HEALTH_PER_SECOND: Final = 20.0
"""Least rate limit of health checks, for each client network. It leaves room for several monitors."""


@dataclass(frozen=True, slots=True)
class AccessControl:
    """The parts of a service with accounts.

    `components`: the stores and caches of accounts and credentials. `policy`: computes the rights of principals.
    `tokens`: issues tokens. `management`: what the management API works with."""

    components: AuthComponents
    policy: Policy
    tokens: TokenService
    management: ManagementComponents


@dataclass(frozen=True, slots=True)
class Service:
    """What a worker serves.

    `distribution` answers requests for `/v2`. `unguarded`: the registry without the check of rights, for health checks.
    `access`: the parts for accounts; None: there are no accounts. `storage_problem` returns a sentence that says why
    nothing can be stored now; None: content can be stored. `is_store_read_only`: the disk was too full to open the
    store for writing, so it was opened for reading. `end_read_only_store`: to be called once another service has
    replaced a service with such a store, which then answers no more calls."""

    distribution: DistributionAPI
    unguarded: Registry
    access: AccessControl | None = None
    storage_problem: Callable[[], str | None] = lambda: None
    end_read_only_store: Callable[[], None] = lambda: None
    is_store_read_only: bool = False


class ServiceFactory:
    """Builds the services of one worker.

    `rate_limit`: the rate limit that all workers share (`shared_rate_limit`); None: no limit. `clock`: returns seconds
    since 1970."""

    def __init__(
        self,
        settings: Settings,
        *,
        rate_limit: RateLimit | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self.rate_limit = rate_limit
        self.clock = clock
        self.body_memory = _body_memory(settings)
        self._guarded_upstreams = [upstream.name for upstream in settings.upstream if upstream.needs_named_grant]
        self._upstream_by_host = {host: upstream.name for upstream in settings.upstream for host in upstream.hosts}

    def without_accounts(self, registry: Registry) -> Service:
        """Returns a service that serves `registry` to everybody, without accounts."""
        restricted = self._restrict(registry)
        guard = Guarded(restricted)
        return Service(self._distribution(guard, OpenAuthenticator(guard, self._guarded_upstreams)), restricted)

    @asynccontextmanager
    async def open(self, *, may_open_read_only: bool) -> AsyncIterator[Service]:
        """A context manager that opens the store, the mirrors and the accounts, and yields a service of them.

        `may_open_read_only`: if the disk is too full to open the store for writing, it is opened for reading; otherwise
        that raises StorageFull. With the setting `read_only`, no garbage is collected, but mirrors still cache new
        content: the setting refuses only pushes and deletes of clients."""
        settings = self.settings
        collect_every = None if settings.read_only else settings.gc.interval
        async with (
            open_backend(
                settings,
                collect_every=collect_every,
                serving=True,
                may_open_read_only=may_open_read_only,
                clock=self.clock,
            ) as backend,
            open_auth_components(
                settings, backend.stored.accounts, backend.stored.leases, clock=self.clock
            ) as components,
        ):
            yield self._with_accounts(backend, components)

    def _with_accounts(self, backend: Backend, components: AuthComponents) -> Service:
        """Returns the service of an opened backend, with accounts."""
        settings, stored, router = self.settings, backend.stored, backend.router
        policy = Policy(
            components.accounts,
            components.revocation_check,
            naming=router.naming,
            guarded=self._guarded_upstreams,
            closed=has_external_logins(settings.auth, settings.issuer, settings.oidc.issuer),
        )
        # Without mirrors, the router would only pass each call on.
        restricted = self._restrict(router if router.mirrors else stored)
        guard = Guarded(
            restricted,
            router.naming,
            router.stored_name,
            denied=_denial_recorder(components),
            renew=policy.reevaluate,
            cursors=components.cursors,
        )
        authenticator = HeaderAuthenticator(guard, policy, components.credential_verifier, clock=components.clock)
        answer_cache = AnswerCache(
            stored.metadata.version, router.is_always_hosted, by_host=bool(self._upstream_by_host)
        )
        behind_proxy = settings.public_url is not None or bool(settings.trusted_proxies)
        management = management_components(components, policy, proxied=behind_proxy, public_url=settings.public_url)
        return Service(
            self._distribution(guard, authenticator, answer_cache, lambda: not policy.closed),
            restricted,
            AccessControl(components, policy, components.token_service(policy), management),
            storage_problem=stored.storage_problem,
            end_read_only_store=stored.retire,
            is_store_read_only=stored.is_read_only,
        )

    def _restrict(self, registry: Registry) -> Registry:
        """Returns `registry` with the restrictions in the settings."""
        return restrict(registry, read_only=self.settings.read_only, delete=self.settings.delete)

    def _distribution(
        self,
        guard: Guarded,
        authenticator: Authenticator,
        answer_cache: AnswerCache | None = None,
        is_open: Callable[[], bool] = lambda: True,
    ) -> DistributionAPI:
        """Returns the distribution API over `guard`. `is_open` returns whether there are no accounts yet."""
        settings = self.settings
        return DistributionAPI(
            Observed(guard),
            limits=RequestLimits(manifest_bytes=settings.limits.manifest),
            public_url=settings.public_url,
            namespaces=self._namespaces(),
            rate_limit=self.rate_limit,
            authenticator=authenticator,
            service=token_service_name(settings.auth, settings.public_url),
            answer_cache=answer_cache,
            cross_site=CrossSiteCheck(settings.public_url, self._upstream_by_host, is_open),
            body_memory=self.body_memory,
        )

    def _namespaces(self) -> Namespaces | None:
        """Returns the upstreams that requests may name by `ns` or by a host; None: the settings have no upstream."""
        upstreams = self.settings.upstream
        if not upstreams:
            return None
        return Namespaces(
            NamingRules.from_settings(self.settings),
            self._upstream_by_host,
            hosts_of(self.settings.public_url),
            {alias: upstream.name for upstream in upstreams for alias in upstream.aliases},
        )


def shared_rate_limit(settings: Settings) -> RateLimit | None:
    """Returns the rate limit in the settings; None: there is none.

    It must be made before the workers are forked, because it counts the requests of all workers in shared memory.
    Health checks count separately, with at least `HEALTH_PER_SECOND` for each network."""
    per_second = settings.limits.requests_per_second
    if not per_second:
        return None
    requests = SharedRateLimiter(per_second, settings.limits.burst or max(1, round(10 * per_second)))
    health_per_second = max(per_second, HEALTH_PER_SECOND)
    health = SharedRateLimiter(health_per_second, round(10 * health_per_second))

    def count(key: str) -> float:
        return (health if key.startswith(HEALTH_KEY) else requests).take(key)

    return count


def _body_memory(settings: Settings) -> BodyMemory:
    """Returns the memory budgets of a worker, each large enough for two manifests of the largest size."""
    min_bytes = 2 * settings.limits.manifest
    return BodyMemory(
        bodies=MemoryBudget(max(REQUEST_BODY_BYTES, min_bytes), "request bodies"),
        answers=MemoryBudget(max(ANSWER_BYTES, min_bytes), "answers", slow_seconds=SLOW_CLIENT_SECONDS),
    )


def _denial_recorder(components: AuthComponents) -> OnDenied:
    """Returns a function that the guard calls when it denies a call of the current request. It adds a line to the audit
    log."""

    def record(principal: Principal, action: Action, name: str) -> None:
        by = replace(current_request().actor, name=principal.name)
        components.audit_buffer.record(by, ",".join(action.words), name, "denied")

    return record
