"""The page *Set-up*: the files and commands with which a client uses the registry at this very address."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fastapi import APIRouter, Request, Response

from registry.clients.client_setup import MirroredHost, mirrored_hosts
from registry.clients.more_setups import PROGRAM_SETUPS
from registry.clients.registry_address import RegistryAddress
from registry.config import Settings
from registry.ui.page_route import PageRoute, caller_of, cookies_of, page_response, query_of
from registry.ui.repository_list import visible_upstreams
from storage.errors import NameUnknown

SETUP_PATH: Final = "/ui/setup"
PROGRAM_NAMES: Final = {
    "docker": "Docker",
    "podman": "Podman",
    "containerd": "containerd",
    "k3s": "k3s",
    "kind": "kind",
    "buildkit": "BuildKit",
    "nas": "Synology/NAS",
    "ci": "CI",
}
"""How the clients of `PROGRAM_SETUPS` are called."""

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get(SETUP_PATH)
async def setup(request: Request) -> Response:
    """Shows how a client is set up. The query can have `client`, a key of `PROGRAM_NAMES`; docker is shown without it.
    Of the upstreams, only those are shown from which the visitor may pull something."""
    program = query_of(request).one("client") or "docker"
    if program not in PROGRAM_SETUPS:
        raise NameUnknown("this client is not known here")
    caller, settings = caller_of(request), request.app.factory.settings
    upstreams = visible_upstreams(request.app.service.pages, caller.principal.listable_names)
    address = RegistryAddress(cookies_of(request).origin)
    hosts = _hosts(settings, upstreams)
    return await page_response(
        request,
        "setup.html",
        section="setup",
        program=program,
        programs=PROGRAM_NAMES,
        setup=PROGRAM_SETUPS[program](address, hosts, not caller.is_registry_open),
        address=address,
        upstreams=upstreams,
        is_unencrypted=settings.public_url is None and address.is_plain_http,
    )


def _hosts(settings: Settings, upstreams: list[str]) -> list[MirroredHost]:
    """Returns the hosts whose images a client gets through this registry."""
    return [
        replace(host, has_short_names=upstream.default)
        for upstream in settings.upstream
        if upstream.name in upstreams
        for host in mirrored_hosts(upstream)
    ]
