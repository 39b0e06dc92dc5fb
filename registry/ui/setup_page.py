"""The page *Set-up*: shows the files and commands that configure a client for this registry. These files and commands
contain the address at which the visitor's browser reaches the registry."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from fastapi import APIRouter, Request, Response

from registry.asgi import client_address
from registry.clients.client_setup import MirroredHost, mirrored_hosts
from registry.clients.more_setups import PROGRAM_SETUPS
from registry.clients.registry_address import RegistryAddress
from registry.config import Settings
from registry.request import RequestInvalid
from registry.ui.page_route import PageRoute, caller_of, cookies_of, page_response, query_of
from registry.ui.repository_list import visible_upstreams
from storage.errors import NameUnknown

SETUP_PATH: Final = "/ui/setup"
CLIENT_NAMES: Final = {
    "docker": "Docker",
    "podman": "Podman",
    "containerd": "containerd",
    "k3s": "k3s",
    "kind": "kind",
    "buildkit": "BuildKit",
    "nas": "Synology/NAS",
    "ci": "CI",
}
"""The names of the clients on the page. The keys are those of `PROGRAM_SETUPS`."""
_PULLING_PROGRAMS: Final = {
    **{name: (name,) for name in ("docker", "podman", "containerd", "buildkit")},
    "k3s": ("containerd",),
    "kind": ("containerd",),
    "nas": ("docker",),
    "ci": ("docker", "buildkit"),
}
"""By client: the programs that pull images for the client (values of `registry.telemetry.recent_clients.PROGRAMS`). For
example, k3s pulls with containerd. A request from one of the programs counts as a request from the client."""

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get(SETUP_PATH)
async def setup(request: Request) -> Response:
    """Shows how a client is set up. Shows only upstreams from which the visitor may pull something. Says when the
    client last sent a request from the visitor's own network. The parameters of the query are:

    - `client`: a key of `CLIENT_NAMES`; `docker` if it is missing.
    - `from`: an IP address. The page also says when the client last sent a request from the network of this address.
      Ignored if the visitor is not an admin, because other visitors may not learn which clients a network has.

    Raises NameUnknown for an unknown client, and RequestInvalid for an invalid address."""
    client = query_of(request).one("client") or "docker"
    if client not in PROGRAM_SETUPS:
        raise NameUnknown("this client is not known here")
    caller, settings = caller_of(request), request.app.factory.settings
    asked_address = _asked_address(request) if caller.rights.admin else ""
    upstreams = visible_upstreams(request.app.service.pages, caller.principal.listable_names)
    registry_address = RegistryAddress(cookies_of(request).origin)
    hosts = _hosts(settings, upstreams)
    return await page_response(
        request,
        "setup.html",
        section="setup",
        client=client,
        client_names=CLIENT_NAMES,
        setup=PROGRAM_SETUPS[client](registry_address, hosts, not caller.is_registry_open),
        address=registry_address,
        upstreams=upstreams,
        visitor_address=client_address(request.scope),
        last_seen=_last_seen(request, client, client_address(request.scope)),
        # `asked_address` is the address in the query. `asked_last_seen` is the time of the client's last request from
        # the network of this address.
        asked_address=asked_address,
        asked_last_seen=_last_seen(request, client, asked_address),
        now=datetime.now(UTC),
        is_unencrypted=settings.public_url is None and registry_address.is_plain_http,
    )


def _asked_address(request: Request) -> str:
    """Returns the IP address in the query; an empty text if there is none. Raises RequestInvalid."""
    text = (query_of(request).one("from") or "").strip()
    try:
        return str(ipaddress.ip_address(text)) if text else ""
    except ValueError:
        raise RequestInvalid("this is not an IP address") from None


def _last_seen(request: Request, client: str, address: str) -> datetime | None:
    """Returns the time of the client's last request from the network of `address`. Returns None if no such request is
    remembered, or if `address` is empty."""
    recent = request.app.telemetry.recent_clients
    times = [recent.last_seen(address, name) for name in _PULLING_PROGRAMS[client]] if recent and address else []
    request_times = [at for at in times if at is not None]
    return datetime.fromtimestamp(max(request_times), UTC) if request_times else None


def _hosts(settings: Settings, upstream_names: list[str]) -> list[MirroredHost]:
    """Returns the hosts of the upstreams in `upstream_names`. Only images of the default upstream have *short names*:
    names without a host, such as `ubuntu`."""
    return [
        replace(host, has_short_names=upstream.default)
        for upstream in settings.upstream
        if upstream.name in upstream_names
        for host in mirrored_hosts(upstream)
    ]
