"""Runs docker-compose with the docker-compose.yml of this repository."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.programs import ForeignProgram, ProgramResult
from tests.fakes.server_process import ROOT


@dataclass(frozen=True)
class ComposeProject:
    """The services of docker-compose.yml, run by a dockerd of the tests."""

    call: ForeignProgram
    variables: Path
    """The file with environment variables that takes the place of `.env`."""

    def __call__(self, *args: str, stdin_text: str = "") -> ProgramResult:
        """Runs `docker-compose ARGS`. Raises CommandFailed if the exit code is not 0."""
        return self.call(*args, stdin_text=stdin_text)

    def run(self, command: str, stdin_text: str = "") -> ProgramResult:
        """Runs a command line that begins with `docker compose`, with `stdin_text` on its stdin. Raises CommandFailed
        if the exit code is not 0."""
        docker, compose, *args = shlex.split(command)
        assert (docker, compose) == ("docker", "compose"), command
        return self(*args, stdin_text=stdin_text)

    def set_variables(self, *lines: str) -> None:
        """Makes these lines, such as `NAME=value`, the content of the file of variables, for all further calls."""
        self.variables.write_text("".join(f"{line}\n" for line in lines))

    def container(self, service: str) -> str:
        """Returns the id of the service's only container."""
        return self("ps", "--quiet", service).out.strip()


def compose_project(docker: DockerEngine, program: str, *overrides: Path) -> ComposeProject:
    """Returns the project of docker-compose.yml, run by the compose program `program`, such as `docker-compose`.
    `overrides`: further files of the project, which change what docker-compose.yml says."""
    variables = docker.folder / "compose.env"
    files = [word for file in (ROOT / "docker-compose.yml", *overrides) for word in ("--file", str(file))]
    command = (program, "--project-name", "entrepot", *files)
    call = ForeignProgram((*command, "--env-file", str(variables)), docker.call.env)
    project = ComposeProject(call.with_variables(DOCKER_HOST=docker.call.prefix[-1]), variables)
    project.set_variables()
    return project
