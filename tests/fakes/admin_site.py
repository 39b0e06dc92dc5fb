"""A running registry with accounts, and helpers that call its management API."""

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
    """A running server with the admin account `root`. `folder`: the folder with the server's data directory. `name`
    returns a new name at each call."""

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
        """Sends one request on a new connection, which any of the worker processes may accept. `auth`: name and
        password; None: without credentials. `query`: the parameters of the URL."""
        with plain_client(f"{self.server.url}/api/v1", timeout=60) as client:
            return client.request(method, path, json=body, auth=auth, headers=headers, params=query or None)

    def call_ok(
        self, method: str, path: str, body: object | None = None, *, auth: Auth = (ADMIN, PASSWORD), **query: Any
    ) -> Any:
        """Sends a request, checks that it succeeds, and returns the JSON of the response."""
        answer = self.call(method, path, body, auth=auth, **query)
        assert answer.is_success, (answer.status_code, answer.text)
        return answer.json() if answer.content else None

    def user(self, **more: Any) -> tuple[str, str]:
        """Adds a user, and returns its name and password. `more`: further fields of the request."""
        name = self.name()
        self.call_ok("POST", "/users", {"name": name, "password": PASSWORD, **more})
        return name, PASSWORD

    def robot(self) -> str:
        name = self.name("robot")
        self.call_ok("POST", "/robots", {"name": name})
        return name

    def token(self, account: str, **more: Any) -> str:
        """Adds an API token, and returns its secret. `more`: further fields of the request."""
        secret: str = self.call_ok("POST", "/tokens", {"account": account, **more})["secret"]
        return secret

    def command(self, *args: str, stdin_text: str | None = None) -> str:
        """Runs `entrepot` on the data directory of this server, and returns its output. `stdin_text`: the text that the
        command gets on stdin."""
        return entrepot_output(*args, folder=self.folder, stdin_text=stdin_text)


def code_of(answer: httpx2.Response) -> str:
    """Returns the error code of a response in the format of the OCI spec."""
    (error,) = answer.json()["errors"]
    assert set(error) <= {"code", "message", "detail"}
    code: str = error["code"]
    return code
