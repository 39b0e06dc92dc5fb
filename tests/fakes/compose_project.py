"""docker-compose on the repository's own docker-compose.yml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.programs import ForeignProgram, ProgramResult
from tests.fakes.server_process import ROOT


@dataclass(frozen=True)
class ComposeProject:
    """The services of the file, run by a dockerd of the tests."""

    call: ForeignProgram
    variables: Path
    """The file that stands for `.env`."""

    def __call__(self, *args: str, given: str = "") -> ProgramResult:
        """Runs `docker-compose ARGS`; raises CommandFailed unless it ends with 0."""
        return self.call(*args, given=given)

    def set_variables(self, **variables: str) -> None:
        """Writes the variables that count from the next call on, and no others."""
        self.variables.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))

    def container(self, service: str) -> str:
        """The id of the service's only container."""
        return self("ps", "--quiet", service).out.strip()


def compose_project(docker: DockerEngine, program: str) -> ComposeProject:
    """`program`: that of compose, such as `docker-compose`."""
    variables = docker.folder / "compose.env"
    command = (program, "--project-name", "entrepot", "--file", str(ROOT / "docker-compose.yml"))
    call = ForeignProgram((*command, "--env-file", str(variables)), docker.call.env)
    project = ComposeProject(call.with_variables(DOCKER_HOST=docker.call.prefix[-1]), variables)
    project.set_variables()
    return project
