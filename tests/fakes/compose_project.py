"""Runs docker-compose with the docker-compose.yml of this repository."""

from __future__ import annotations

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

    def __call__(self, *args: str, given: str = "") -> ProgramResult:
        """Runs `docker-compose ARGS`. Raises CommandFailed if the exit code is not 0."""
        return self.call(*args, given=given)

    def set_variables(self, **variables: str) -> None:
        """Replaces all variables in the file. The next call of docker-compose uses the new ones."""
        self.variables.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))

    def container(self, service: str) -> str:
        """Returns the id of the service's only container."""
        return self("ps", "--quiet", service).out.strip()


def compose_project(docker: DockerEngine, program: str) -> ComposeProject:
    """Returns the project. `program`: the name of the compose program, such as `docker-compose`."""
    variables = docker.folder / "compose.env"
    command = (program, "--project-name", "entrepot", "--file", str(ROOT / "docker-compose.yml"))
    call = ForeignProgram((*command, "--env-file", str(variables)), docker.call.env)
    project = ComposeProject(call.with_variables(DOCKER_HOST=docker.call.prefix[-1]), variables)
    project.set_variables()
    return project
