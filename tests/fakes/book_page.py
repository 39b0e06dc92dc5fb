"""Runs the commands of a page of the book as a reader would: one after the other, in one folder, with one server.

Adapts the commands to the test. The address of the registry becomes the address of the server, and absolute paths
become paths below the folder. Each upstream becomes a fake Hub, so `--mirror docker.io` becomes an `[[upstream]]` whose
endpoint is the fake Hub. A command that would prompt for a password gets the password on its stdin.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from book.markdown_blocks import Block, blocks
from book.pages import ROOT, page_file, page_names
from tests.fakes.client_images import image
from tests.fakes.clients.container_tools import ContainerTools
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.registry_client import RegistryClient
from tests.fakes.commands import command_environment, entrepot
from tests.fakes.hub.hub import hub
from tests.fakes.page_sections import Command, commands_of, joined_lines, shape_of
from tests.fakes.server_process import RegistryServer, start_server
from tests.fakes.upstream_content import UpstreamContent, image_tree_of

PASSWORD: Final = "correct horse battery"
WITH_DOCKER: Final = "with docker"
NOT_RUN: Final = "not run here: "
SHELL_TIMEOUT: Final = 200.0  # seconds
_PREPARATION: Final = re.compile(r"\btest: (.+)$")
"""Matches `test: KEY` at the end of the mark of a block, such as `test: people`. The *mark* is the text after the
language, in the first line of the block. KEY is a key of `PREPARATIONS`."""
_COMMAND: Final = re.compile(r"(?P<variables>(?:\w+=\S+ )+)?entrepot (?P<words>[^>]+?)(?: > (?P<file>\S+))?")
_SHELL: Final = re.compile(r"[|<>;&$`*]")
_TOKEN_ID: Final = re.compile(r"\b(?=\w*[A-Z0-9])[0-9A-Za-z]{12}\b")
"""Matches the id of an API token, such as `UGLgmhaDgtyu`: 12 letters and digits. At least one of them is a digit or a
capital letter, so that plain words do not match. The id on a page differs from the id in the output of the test."""
_PROMPTS: Final = re.compile(r"^(Password for .*:|The same again:)$")
_UPSTREAM: Final = '[[upstream]]\nname = "{name}"\ndefault = {default}\nendpoints = ["{url}"]\n'
_IMAGES: Final = {
    "library/busybox": ("latest",),
    "library/ubuntu": ("latest", "24.04"),
    "org/app": ("latest", "1"),
}
"""The repositories and tags that every upstream of the pages has."""


@dataclass(frozen=True, slots=True)
class PageClients:
    """Real clients. dockerd uses the registry at `port` as its mirror of Docker Hub."""

    docker: DockerEngine
    tools: ContainerTools
    port: int


def pages_in_english() -> dict[str, Path]:
    """Returns the files of the English pages and of the README, by the names of the pages."""
    pages = {page: file for page in page_names() if (file := page_file(page, "en")).exists()}
    return {"README": ROOT / "README.md", **pages}


def command_blocks(file: Path) -> list[Block]:
    """Returns the blocks of commands on a page: sessions at a terminal, and scripts."""
    return [block for block in blocks(file.read_text()) if block.language in ("console", "sh")]


def runnable_blocks(file: Path) -> list[Block]:
    """Returns the blocks of commands that the tests run. Leaves out those whose mark begins with NOT_RUN: a block that
    begins with "```console not run here: REASON" has the mark `not run here: REASON`."""
    return [block for block in command_blocks(file) if not block.mark.startswith(NOT_RUN)]


def needs_clients(block: Block) -> bool:
    """Returns whether a block has commands of docker, podman or skopeo."""
    return block.mark.startswith(WITH_DOCKER)


class PageRun:
    """The folder, the server and the variables of one run of a page."""

    def __init__(self, folder: Path, stack: ExitStack, clients: PageClients | None = None) -> None:
        """`clients`: the real docker, podman and skopeo; None: blocks that need them are skipped. `stack`: stops the
        server when it is closed."""
        self.folder = folder
        self.clients = clients
        self._stack = stack
        self._server: RegistryServer | None = None
        self._variables: dict[str, str] = {}
        self._digest = ""
        self._write_settings()

    def run_page(self, file: Path) -> None:
        """Runs the blocks of a page. Skips blocks that need clients if there are no clients. Raises AssertionError if a
        command ends with another exit code than the page shows, or does not print a line that the page shows."""
        chosen = [block for block in runnable_blocks(file) if self.clients or not needs_clients(block)]
        serves = any("entrepot serve" in block.text for block in chosen)
        for block in chosen:
            if found := _PREPARATION.search(block.mark):
                PREPARATIONS[found[1]](self)
            for command in commands_of(block.text):
                # On a page without `entrepot serve`, any command may need the server, so the first one starts it. On a
                # page with `entrepot serve`, that command starts it. The `entrepot` commands before that one run
                # without a server, as for a reader. Commands of other programs, such as docker, start it as well.
                self._run(command, starts_server=not serves or not command.line.startswith("entrepot"))

    @property
    def server(self) -> RegistryServer:
        """The server, which the first access to this property starts."""
        if self._server is None:
            listen = f"127.0.0.1:{self.clients.port if self.clients else 0}"
            self._server = start_server(self.folder, "--config", str(self._settings), workers=1, listen=listen)
            self._stack.callback(self._server.stop)
        return self._server

    @property
    def _settings(self) -> Path:
        return self.folder / "etc" / "entrepot" / "entrepot.toml"

    def _write_settings(self) -> None:
        """Starts a fake Hub, and writes a settings file in which all upstreams of the pages have this fake Hub as their
        endpoint."""
        content = UpstreamContent()
        for repo, tags in _IMAGES.items():
            content.add(repo, image_tree_of(image(f"hello from {repo}")), *tags)
        url = self._stack.enter_context(hub(self.folder, content)).url
        upstreams = [
            _UPSTREAM.format(name=name, default=str(name == "docker.io").lower(), url=url)
            for name in ("docker.io", "ghcr.io")
        ]
        backup = f'[backup]\ntarget = "{self.folder / "mnt" / "backups"}"\n'
        retention = '[[retention]]\nrepositories = "team/**"\nkeep_last = 10\n'
        self._settings.parent.mkdir(parents=True)
        self._settings.write_text("".join([f'data = "{self.folder / "data"}"\n', *upstreams, retention, backup]))
        (self.folder / "entrepot.toml").symlink_to(self._settings)

    def _run(self, command: Command, *, starts_server: bool) -> None:
        if match := re.fullmatch(r"(?:export )?(\w+)=(\S+)", command.line):
            self._variables[match[1]] = self._with_local_paths(match[2])
            return
        if command.line.startswith("entrepot serve") or starts_server:
            assert self.server  # the access starts the server
        if command.line.startswith("entrepot serve"):
            return
        match = _COMMAND.fullmatch(command.line)
        done = self._entrepot(match) if match and _is_plain(match["words"]) else self._shell(command.line)
        output = done.stderr + done.stdout
        expected_output = "\n".join(command.output)
        message = f"$ {command.line}\n{output}(exit code {done.returncode}), but the page has:\n{expected_output}"
        assert done.returncode == command.exit_code, message
        expected = [line for line in command.output if not _PROMPTS.match(line)]
        printed = joined_lines(self._as_on_the_page(output).splitlines())
        assert all(any(map(partial(_is_printed_as, line), printed)) for line in expected), message

    def _entrepot(self, command: re.Match[str]) -> subprocess.CompletedProcess[str]:
        """Runs an `entrepot` command that needs no shell. The process is a fork, which starts faster than a new
        interpreter."""
        words = shlex.split(self._with_local_paths(command["words"]), comments=True)
        stdin_text = None
        if words[:2] == ["user", "add"] and "--generate" not in words:
            words += ["--password-file", "-"]
            stdin_text = PASSWORD
        variables = dict(pair.split("=", 1) for pair in (command["variables"] or "").split())
        variables["ENTREPOT_CONFIG"] = str(self._settings)
        done = entrepot(*words, folder=self.folder, stdin_text=stdin_text, **variables)
        if command["file"]:
            (self.folder / command["file"]).write_text(done.stdout)
            done.stdout = ""
        return done

    def _prepare_accounts(self, *lines: str) -> None:
        for line in lines:
            found = _COMMAND.fullmatch(f"entrepot {line}")
            assert found
            done = self._entrepot(found)
            assert done.returncode == 0, done.stderr

    def _shell(self, line: str) -> subprocess.CompletedProcess[str]:
        """Runs a line with bash. Adds the password where a program would ask for it."""
        text = re.sub(r"(--user|-u) alice\b", rf"\1 alice:'{PASSWORD}'", self._with_local_paths(line))
        if "docker login" in text and "--password-stdin" not in text:
            text = f"{text} --password-stdin <<< '{PASSWORD}'"
        if self._digest:  # the page writes the digest of the pushed image as `sha256:4f53…`
            text = text.replace("sha256:4f53…", self._digest)
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder,
            env=self._environment(),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=SHELL_TIMEOUT,
            check=False,
        )

    def _environment(self) -> dict[str, str]:
        """Returns the environment of the shell. Its PATH begins with a folder that has `entrepot` and the clients of
        the test."""
        programs = self.folder / "bin"
        if not programs.exists():
            programs.mkdir()
            for name, words in self._programs():
                (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
                (programs / name).chmod(0o755)
        variables = command_environment(**{**self._variables, "ENTREPOT_CONFIG": str(self._settings)})
        return {**variables, "PATH": f"{programs}:{variables['PATH']}"}

    def _programs(self) -> Iterator[tuple[str, list[str]]]:
        """Yields, for each program that the commands of a page may use, its name there, and the words of the command
        with which the test runs it."""
        yield "entrepot", [sys.executable, "-m", "registry"]
        if self.clients:
            for name, program in (
                ("docker", self.clients.docker.call),
                ("podman", self.clients.tools.podman),
                ("skopeo", self.clients.tools.skopeo),
            ):
                yield name, ["env", *(f"{key}={value}" for key, value in program.env.items()), *program.prefix]

    def _with_local_paths(self, text: str) -> str:
        """Returns the text with the address of the server in place of the page's address, and with paths below the
        folder in place of absolute paths."""
        if re.search(r"registry\.example\.com|127\.0\.0\.1:5000|localhost:5000", text):
            address = self.server.address
            text = re.sub(r"https?://registry\.example\.com(:5000)?", f"http://{address}", text)
            text = re.sub(r"registry\.example\.com(:5000)?|127\.0\.0\.1:5000|localhost:5000", address, text)
        text = re.sub(r" --mirror \S+", "", text)
        return re.sub(r"(?<![\w.])/(mnt|srv|var|etc)/", rf"{self.folder}/\1/", text)

    def _as_on_the_page(self, output: str) -> str:
        return output.replace(f"{self.folder}/data", "/srv/entrepot/data").replace(f"{self.folder}/", "/")

    def add_people(self) -> None:
        """Adds the accounts and the group to which the block grants rights."""
        self._prepare_accounts("user add bob", "user add carol", "robot add deploy", "group add dev")

    def add_accounts(self) -> None:
        """Adds the admin alice, and a group."""
        self._prepare_accounts("user add alice --admin", "group add dev")

    def remove_group(self) -> None:
        """Removes the group `dev`, because the block adds it with `entrepot group add`. `add_people` has added this
        group for an earlier block of the page."""
        self._prepare_accounts("group remove dev")

    def read_token(self) -> None:
        """Sets the variable TOKEN to the secret that an earlier command of the page has written into a file."""
        self._variables["TOKEN"] = (self.folder / "ci.secret").read_text().strip()

    def load_image(self, *names: str) -> None:
        """Loads an image into docker under each of `names`."""
        assert self.clients is not None
        for name in names:
            self.clients.docker.load(image("hello"), self._with_local_paths(name))

    def push_image(self) -> None:
        """Pushes team/app:v1 to the registry, and adds the admin alice, who may pull it."""
        pushed = image("hello from team/app")
        RegistryClient(self.server.address).push("team/app", "v1", pushed)
        self._digest = pushed.digest
        self.add_accounts()


def _is_printed_as(shown: str, printed: str) -> bool:
    """Returns whether the line `shown` of the page agrees with the line `printed` of the output. `...` at the end of
    the page's line stands for any text."""
    shape = _shape(printed)
    if shown.endswith(" ..."):
        return shape.startswith(_shape(shown.removesuffix("...")))
    return shape == _shape(shown)


def _shape(line: str) -> str:
    """Returns the line with fixed words in place of texts that differ between runs: digests, times, the ids of API
    tokens, and (with `is_loose`) numbers."""
    return shape_of(_TOKEN_ID.sub("ID", line), is_loose=True)


def _is_plain(words: str) -> bool:
    """Returns whether a command needs no shell: it has no special characters outside quotes."""
    return not _SHELL.search(re.sub(r"'[^']*'|#.*$", "", words))


def _image_and_token(run: PageRun) -> None:
    run.load_image("registry.example.com/team/app:v1")
    run.read_token()


PREPARATIONS: Final[dict[str, Callable[[PageRun], None]]] = {
    "people": PageRun.add_people,
    "no group": PageRun.remove_group,
    "accounts": PageRun.add_accounts,
    "token": PageRun.read_token,
    "busybox": lambda run: run.load_image("busybox:latest"),
    "image and token": _image_and_token,
    "pushed image": PageRun.push_image,
}
"""The preparations that the mark of a block can name (`_PREPARATION`). The named one runs before the block."""


def root_files() -> list[Path]:
    """Returns the documents in the root of the repository that readers see."""
    return [path for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md") if (path := ROOT / name).exists()]
