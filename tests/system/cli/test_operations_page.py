"""Tests that the commands on the page docs/en/operations.md print what the page shows, while a server runs."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fakes.commands import entrepot
from tests.fakes.hub.hub import hub
from tests.fakes.page_sections import Command, Section, has_shape, read_sections
from tests.fakes.server_process import ROOT, RegistryServer, running_server
from tests.fakes.upstream_content import UpstreamContent, noise_image
from tests.system.cli.upkeep_page_place import Place
from tests.unit.registry.cli.diagnosis import client_file_texts as texts

SECTIONS = read_sections(ROOT / "docs" / "en" / "operations.md")
SECTIONS_TO_RUN = [section for section in SECTIONS if section.parts]
RUN_ELSEWHERE = {
    "tests/unit/registry/status/test_readiness.py": ["curl -s http://localhost:5000/readyz"],
    "tests/system/ops/test_doctor.py": ["sudo entrepot doctor -c /etc/entrepot/entrepot.toml"],
    "tests/system/ops/test_mirror_speed.py": [
        "entrepot mirror test docker.io --endpoint https://registry-1.docker.io --endpoint https://mirror.gcr.io"
    ],
}
"""The commands of the page that are not run here, by the test file that runs them. They need a full disk, an expired
certificate or other networks."""
HUB = "https://registry-1.docker.io"
UPSTREAM = '[[upstream]]\nname = "docker.io"\ndefault = true\nendpoints = ["{url}"]\n'
DEADLINE_SECONDS = 60.0


class OperationsPlace(Place):
    """A server with two workers for the commands of one section. In `folder`, its data, its settings and the files of
    clients have the same paths as on the page."""

    @property
    def server(self) -> RegistryServer:
        if self._server is None:
            self.settings_file.parent.mkdir(parents=True, exist_ok=True)
            self.settings_file.write_text(self._settings)
            (self.folder / "srv").mkdir()
            (self.folder / "srv" / "entrepot").symlink_to(self.data)
            flags = ("--config", str(self.settings_file))
            self._server = self._stack.enter_context(running_server(self.folder, *flags, workers=2))
        return self._server

    @property
    def settings_file(self) -> Path:
        return self.folder / "etc" / "entrepot" / "entrepot.toml"

    def run(self, command: Command) -> None:
        """Runs a command of the page, and checks its output. A `status` command is repeated until its output is that of
        the page, because the workers report their state only once a second."""
        assert self.server
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            result = self._entrepot(command.line)
            output = self._as_on_the_page(result.stdout + result.stderr)
            if result.returncode == command.exit_code and has_shape(output, command.output, is_loose=True):
                return
            on_page = "\n".join(command.output)
            difference = f"$ {command.line}\n{output}(exit code {result.returncode}), but the page has:\n{on_page}"
            assert "status" in command.line, difference
            assert time.monotonic() < deadline, difference

    def prepare(self, name: str) -> None:
        PREPARATIONS[name](self)

    def _entrepot(self, line: str) -> subprocess.CompletedProcess[str]:
        words = self._here(line).split()
        assert words.pop(0) == "entrepot", f"mark the block of {line!r} as one that is not run here"
        if words[:2] == ["client", "check"]:
            words += ["--root", str(self.folder), "--offline"]
        data = str(self.folder / "srv" / "entrepot")
        return entrepot(*words, folder=self.folder, ENTREPOT_DATA=data, ENTREPOT_CONFIG=str(self.settings_file))

    def change_settings(self) -> None:
        """Changes the settings as in the page's example of a reload."""
        self._settings = UPSTREAM.format(url=HUB) + "tag_ttl = 60\n[gc]\ngrace = 100\n"
        assert self.server
        self.settings_file.write_text(UPSTREAM.format(url=HUB) + "tag_ttl = 70\n[gc]\ngrace = 200\n")

    def start_busy_server(self) -> None:
        """Starts a server with an unfinished upload. Its upstream has reported how many pulls it still allows."""
        content = UpstreamContent()
        content.add("library/app", noise_image("app", 1000), "1")
        self.addresses[HUB] = self._stack.enter_context(hub(self.folder, content, limit=100)).url
        self._settings = UPSTREAM.format(url=self.addresses[HUB]) + '[disk]\nmin_free = "1MiB"\n'
        assert self.client.ask("GET", "/v2/library/app/manifests/1").status == 200
        location = self.client.ask("POST", "/v2/team/app/blobs/uploads/").headers["Location"]
        assert self.client.ask("PATCH", location, b"x" * 1000).status == 202

    def write_node(self) -> None:
        """Writes containerd's default settings, and a hosts.toml that names the registry as a mirror."""
        folder = self.folder / "etc" / "containerd"
        (folder / "certs.d" / "docker.io").mkdir(parents=True)
        (folder / "config.toml").write_text(texts.CONTAINERD_2_2_DEFAULT)
        hosts = texts.HOSTS_TOML.replace("http://registry.example.com:5000", "https://registry.example.com")
        (folder / "certs.d" / "docker.io" / "hosts.toml").write_text(hosts)


PREPARATIONS: dict[str, Callable[[OperationsPlace], None]] = {
    "changed settings": OperationsPlace.change_settings,
    "busy server": OperationsPlace.start_busy_server,
    "node with containerd 2.2": OperationsPlace.write_node,
}
"""The functions that make the preparations. On the page, the mark `test: NAME` of a block names its preparation."""


@pytest.mark.parametrize("section", SECTIONS_TO_RUN, ids=lambda section: section.title.partition(",")[0])
def test_the_commands_print_what_the_page_shows(tmp_path: Path, section: Section) -> None:
    """Each command has the exit code that the page shows, or 0, and an output of the same shape. Numbers may differ."""
    with ExitStack() as stack:
        place = OperationsPlace(tmp_path, section, stack)
        for part in section.parts:
            if isinstance(part, Command):
                place.run(part)
            else:
                place.prepare(part)


def test_every_command_of_the_page_is_run_in_a_test() -> None:
    """Every command of the page is run here or in another existing test file, and every preparation is used."""
    found: dict[str, list[str]] = {}
    for section in SECTIONS:
        found |= section.elsewhere
    assert found == RUN_ELSEWHERE
    assert [file for file in found if not (ROOT / file).is_file()] == []
    assert {part for section in SECTIONS for part in section.parts if isinstance(part, str)} == set(PREPARATIONS)
    assert len([part for section in SECTIONS_TO_RUN for part in section.parts if isinstance(part, Command)]) == 4
