"""A running registry with accounts for tests of real clients. Each test adds its own users and robots."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite

from .container_tools import ContainerTools
from .docker_engine import DockerEngine
from .registry_client import RegistryClient

WRONG = "not the password"


@dataclass(frozen=True)
class ClientLogin:
    """The name of an account, and its password or an API token."""

    name: str
    secret: str

    @property
    def basic(self) -> str:
        """The value of the `Authorization` header."""
        return "Basic " + self.encoded

    @property
    def encoded(self) -> str:
        """The login as docker's config.json stores it."""
        return base64.b64encode(f"{self.name}:{self.secret}".encode()).decode()


ROOT = ClientLogin(ADMIN, PASSWORD)
"""The admin account, with which tests check the content that other accounts have pushed."""


@dataclass
class SiteWithAccounts(AdminSite):
    """A running registry to which tests add accounts. `rights` has the allowed actions by pattern of repository names,
    such as `{"team/**": "pull,push"}`."""

    @property
    def address(self) -> str:
        return self.server.address

    def add_user(self, rights: Mapping[str, str] | None = None) -> ClientLogin:
        """Adds a user with a password and these rights."""
        name, password = self.user()
        self.grant(f"user:{name}", rights or {})
        return ClientLogin(name, password)

    def add_robot(self, rights: Mapping[str, str] | None = None) -> ClientLogin:
        """Adds a robot with an API token and these rights."""
        name = self.robot()
        self.grant(f"robot:{name}", rights or {})
        return ClientLogin(name, self.token(name))

    def grant(self, subject: str, rights: Mapping[str, str]) -> None:
        for pattern, actions in rights.items():
            self.call_ok("PUT", "/grants", {"subject": subject, "pattern": pattern, "actions": actions.split(",")})

    def allow_everyone(self, pattern: str) -> None:
        """Lets every client pull from repositories that match the pattern, also without a login."""
        self.grant("everyone", {pattern: "pull"})

    def client(self, login: ClientLogin = ROOT) -> RegistryClient:
        return RegistryClient(self.address, login.basic)


def logged_out(docker: DockerEngine, folder: Path) -> DockerEngine:
    """Returns a docker client of the same daemon that is not logged in to any registry. It stores logins in
    `folder`."""
    return replace(docker, call=docker.call.with_variables(DOCKER_CONFIG=str(folder)))


def tools_logged_out(tools: ContainerTools, folder: Path) -> ContainerTools:
    """Returns podman, buildah and skopeo without a login to any registry. They store logins in `folder`."""
    auth_file = str(folder / "auth.json")
    (folder / "auth.json").write_text("{}")
    podman, buildah, skopeo = (
        each.with_variables(REGISTRY_AUTH_FILE=auth_file) for each in (tools.podman, tools.buildah, tools.skopeo)
    )
    return ContainerTools(podman, buildah, skopeo, tools.folder)
