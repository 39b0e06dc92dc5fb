"""A registry with accounts. Each test makes its own users and robots, who log in with real clients."""

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
    """A user name and a password, or an API token in its place."""

    name: str
    secret: str

    @property
    def basic(self) -> str:
        """The value of the `Authorization` header."""
        return "Basic " + self.encoded

    @property
    def encoded(self) -> str:
        """The login in the form of docker's config.json."""
        return base64.b64encode(f"{self.name}:{self.secret}".encode()).decode()


ROOT = ClientLogin(ADMIN, PASSWORD)
"""An admin, with which tests check what others have pushed."""


@dataclass
class MemberSite(AdminSite):
    """A site whose tests add accounts of their own. Rights are given by pattern: `{"team/**": "pull,push"}`."""

    @property
    def address(self) -> str:
        return self.server.address

    def person(self, rights: Mapping[str, str] | None = None) -> ClientLogin:
        """Adds a user with a password."""
        name, password = self.user()
        self.grant(f"user:{name}", rights or {})
        return ClientLogin(name, password)

    def machine(self, rights: Mapping[str, str] | None = None) -> ClientLogin:
        """Adds a robot with an API token."""
        name = self.robot()
        self.grant(f"robot:{name}", rights or {})
        return ClientLogin(name, self.token(name))

    def grant(self, subject: str, rights: Mapping[str, str]) -> None:
        for pattern, actions in rights.items():
            self.done("PUT", "/grants", {"subject": subject, "pattern": pattern, "actions": actions.split(",")})

    def allow_everyone(self, pattern: str) -> None:
        """Lets everyone pull from repositories that match the pattern, also without a login."""
        self.grant("everyone", {pattern: "pull"})

    def wire(self, login: ClientLogin = ROOT) -> RegistryClient:
        return RegistryClient(self.address, login.basic)


def logged_out(docker: DockerEngine, folder: Path) -> DockerEngine:
    """Returns docker on the same daemon for a person without any login. Its logins are stored in `folder`."""
    return replace(docker, call=docker.call.with_variables(DOCKER_CONFIG=str(folder)))


def tools_logged_out(tools: ContainerTools, folder: Path) -> ContainerTools:
    """Returns podman, buildah and skopeo for a person without any login. Their logins are stored in `folder`."""
    kept = str(folder / "auth.json")
    (folder / "auth.json").write_text("{}")
    podman, buildah, skopeo = (
        each.with_variables(REGISTRY_AUTH_FILE=kept) for each in (tools.podman, tools.buildah, tools.skopeo)
    )
    return ContainerTools(podman, buildah, skopeo, tools.folder)
