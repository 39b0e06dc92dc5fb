"""A registry with accounts, and those who call its management API."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from tests.fakes.commands import entrepot_output
from tests.fakes.plain_client import plain_client
from tests.fakes.server_process import RegistryServer

ADMIN, PASSWORD = "root", "correct horse battery"
Auth = tuple[str, str] | None


@dataclass
class AdminSite:
    """A running server whose admin is `root`. Names that `name` makes are nobody else's."""

    server: RegistryServer
    folder: Path
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def name(self, kind: str = "user") -> str:
        return f"{kind}-{next(self._numbers)}"

    def call(
        self,
        method: str,
        path: str,
        body: object | None = None,
        *,
        auth: Auth = (ADMIN, PASSWORD),
        headers: dict[str, str] | None = None,
        **query: Any,
    ) -> httpx2.Response:
        """One request on a connection of its own, so it comes to any of the workers."""
        with plain_client(f"{self.server.url}/api/v1", timeout=60) as client:
            return client.request(method, path, json=body, auth=auth, headers=headers, params=query or None)

    def done(
        self, method: str, path: str, body: object | None = None, *, auth: Auth = (ADMIN, PASSWORD), **query: Any
    ) -> Any:
        """What a request gives that has to go well."""
        answer = self.call(method, path, body, auth=auth, **query)
        assert answer.is_success, (answer.status_code, answer.text)
        return answer.json() if answer.content else None

    def user(self, **more: Any) -> tuple[str, str]:
        """A new one: name and password."""
        name = self.name()
        self.done("POST", "/users", {"name": name, "password": PASSWORD, **more})
        return name, PASSWORD

    def robot(self) -> str:
        name = self.name("robot")
        self.done("POST", "/robots", {"name": name})
        return name

    def token(self, account: str, **more: Any) -> str:
        """The secret of a new one."""
        secret: str = self.done("POST", "/tokens", {"account": account, **more})["secret"]
        return secret

    def command(self, *args: str, given: str | None = None) -> str:
        """What `entrepot` says that works on the data directory beside this server."""
        return entrepot_output(*args, folder=self.folder, given=given)


def code_of(answer: httpx2.Response) -> str:
    """The error's code, of an answer in the OCI spec's shape."""
    (error,) = answer.json()["errors"]
    assert set(error) <= {"code", "message", "detail"}
    code: str = error["code"]
    return code
