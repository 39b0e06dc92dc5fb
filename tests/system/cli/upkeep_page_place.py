"""The environment for the commands on the pages docs/en/upkeep.md, moving.md and air-gapped.md: a server, and the
content that the sections of the pages presuppose (`Place.prepare`). Used by the tests that run these commands."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

from storage.composition import open_registry, prepare_data_dir
from storage.content import Actor
from storage.data_dir.layout import Layout
from storage.names import Digest, RepositoryName, Tag
from storage.pulls import PullCount
from storage.store.stored_registry import StoredRegistry
from tests.fakes.client_images import ClientImage, image
from tests.fakes.clients.registry_client import RegistryClient, pull_all
from tests.fakes.commands import entrepot, entrepot_output
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.old_directory import OldDirectory
from tests.fakes.page_sections import Command, Section, has_shape
from tests.fakes.process_resources import eventually
from tests.fakes.registry_content import push_blob, push_image
from tests.fakes.scrub_runs import flip_byte
from tests.fakes.server_process import RegistryServer, running_server
from tests.fakes.upkeep_store import APP, DAY, Clock
from tests.fakes.upstream_content import UpstreamContent, index_of, noise_image

ALICE = Actor(name="alice", address="192.0.2.9")
CI = Actor(name="ci", address="192.0.2.7")
OLD_PASSWORD = "the password of the old one"
OLD_CONFIG = """
version: 0.1
storage:
  delete:
    enabled: true
  filesystem:
    rootdirectory: /var/lib/registry
http:
  addr: :5000
auth:
  htpasswd:
    realm: old
    path: /auth/htpasswd
"""


class Place:
    """A folder in which the commands of one section run, and a server that runs at the same time.

    The paths on the page that begin with /mnt, /srv, /var or /etc are below the folder. Servers of the tests stand for
    the other servers on the page. `addresses` maps each URL on the page to the URL of the server that stands for it.
    The server of the section starts with the first command."""

    def __init__(self, folder: Path, section: Section, stack: ExitStack) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.addresses: dict[str, str] = {}
        self._settings = section.settings
        self._stack = stack
        self._server: RegistryServer | None = None
        self._hub: Hub
        self._images: list[ClientImage] = []
        prepare_data_dir(self.data)

    @property
    def server(self) -> RegistryServer:
        """The server. The first access starts it."""
        if self._server is None:
            (self.folder / "entrepot.toml").write_text(self._settings_for_tests())
            flags = ("--config", str(self.folder / "entrepot.toml"))
            self._server = self._stack.enter_context(running_server(self.folder, *flags, workers=1))
        return self._server

    @property
    def client(self) -> RegistryClient:
        return RegistryClient(self.server.address)

    def run(self, command: Command) -> None:
        """Runs a command of the page, and checks that its exit code and the shape of its output are those of the
        page."""
        assert self.server
        result = self._entrepot(command.line)
        # On the page, the output has both streams. Which of them comes first differs from command to command.
        outputs = [
            self._as_on_the_page(text) for text in (result.stderr + result.stdout, result.stdout + result.stderr)
        ]
        on_page = "\n".join(command.output)
        difference = f"$ {command.line}\n{outputs[0]}(exit code {result.returncode}), but the page has:\n{on_page}"
        assert result.returncode == command.exit_code, difference
        assert any(has_shape(output, command.output) for output in outputs), difference

    def prepare(self, name: str) -> None:
        """Makes the preparation with this name, which is in the mark `test: NAME` of a block of the page."""
        PREPARATIONS[name](self)

    def fill(self, work: Callable[[StoredRegistry, Clock], Awaitable[None]]) -> None:
        """Runs `work` with the store and its clock, which `work` may change."""

        async def run() -> None:
            clock = Clock(time.time())
            async with open_registry(self.data, clock=clock) as store:
                await work(store, clock)

        asyncio.run(run())

    def push(self, repo: str, tag: str) -> ClientImage:
        """Pushes an image over HTTP."""
        pushed_image = image(f"{repo}:{tag}")
        self.client.push(repo, tag, pushed_image)
        self._images.append(pushed_image)
        return pushed_image

    def _entrepot(self, line: str) -> subprocess.CompletedProcess[str]:
        words = shlex.split(self._here(line))
        assert words.pop(0) == "entrepot", f"{line!r} is not run here: mark its block with `not run here: FILE`"
        paths = {"ENTREPOT_CONFIG": str(self.folder / "entrepot.toml"), "ENTREPOT_DATA": str(self.data)}
        return entrepot(*words, folder=self.folder, **paths)

    def _here(self, text: str) -> str:
        """Replaces the URLs and paths of the page by those of this test."""
        for page_url, test_url in self.addresses.items():
            text = text.replace(page_url, test_url)
        return re.sub(r"(?<!\S)/(mnt|srv|var|etc)/", rf"{self.folder}/\1/", text)

    def _as_on_the_page(self, output: str) -> str:
        """Replaces the URLs and paths of this test by those of the page."""
        for page_url, test_url in self.addresses.items():
            output = output.replace(test_url, page_url)
        return output.replace(f"{self.folder}/", "/")

    def _settings_for_tests(self) -> str:
        """Returns the settings of the page, with the URLs of this test. The limits for free space are in MiB instead of
        GiB, because the disk of a test may be small."""
        settings = re.sub(r'((?:min|target)_free = "\d+)GiB', r"\1MiB", self._settings)
        settings = re.sub(r"(min_free_percent) = \d+", r"\1 = 0.01", settings)
        for page_url, test_url in self.addresses.items():
            name = page_url.removeprefix("https://")
            settings = settings.replace(f'name = "{name}"', f'name = "{name}"\nendpoints = ["{test_url}"]')
        return settings

    def start_upstream(self, url: str, content: UpstreamContent) -> None:
        """Starts an upstream that stands for `url`."""
        self._hub = self._stack.enter_context(hub(self.folder, content))
        self.addresses[url] = self._hub.url

    def move_upstream_tag(self) -> None:
        """Pulls a tag, moves it at the upstream, and refreshes it."""
        self.client.manifest("ghcr.io/org/app", "1")
        moved = UpstreamContent()
        moved.add("org/app", noise_image("second", 1000), "1")
        self._hub.put(moved)
        assert self._entrepot("entrepot mirror refresh ghcr.io/org/app:1").returncode == 0

    def pull_images(self) -> None:
        """Pulls the images of `_four_images` through the mirror, which then has them in its cache."""
        for number in range(1, 5):
            pull_all(self.client, f"docker.io/library/app{number}", "1")

    def push_one(self) -> None:
        self.push("team/app", "1")

    def wait_for_quota(self) -> None:
        """Pushes an image, and waits until the server has counted the existing content, which it does once for a new
        quota."""
        self.push("team/app", "1")
        in_effect = eventually(lambda: "in effect" in self._entrepot("entrepot quota list").stdout, patience=60)
        assert in_effect, "the server has not counted the content of the quota"

    def damage_blob(self) -> None:
        """Pushes two images, and changes a byte in a layer of the first."""
        self.push("team/app", "1")
        self.push("team/web", "1")
        flip_byte(self._layer_file(0))

    def lose_blob(self) -> None:
        """Repairs the blob that `damage_blob` has damaged: pushes its image again. Then removes the file of a blob of
        the other image."""
        self.push("team/app", "1")
        self._layer_file(1).unlink()

    def _layer_file(self, number: int) -> Path:
        return Layout(self.data).blob(Digest(self._images[number].layers[-1].digest))

    def write_old_registry(self) -> None:
        """Writes the data directory of an old registry. One image in it lacks its blobs. Also starts a server that
        stands for an old registry on the network."""
        old = OldDirectory(self.folder / "var" / "lib" / "docker-registry")
        old.push("team/app", noise_image("team", 1000), "1")
        whole, broken = noise_image("whole", 1000), noise_image("broken", 1000)
        old.push("tools/build", index_of((whole, "amd64"), (broken, "arm64")), "1.0")
        # The blobs of an image are imported at the same time. If one of them was there, it would be imported in some
        # runs only, depending on when the import notices the missing one.
        for digest in broken.blobs:
            old.data(digest).unlink()
        self._start_other_server("https://old.example.com", "ann", "team/web", "other/web")

    def start_harbor(self) -> None:
        """Starts a server that stands for a Harbor registry, with a project of images and a project that is a proxy
        cache."""
        self._start_other_server("https://harbor.example.com", "admin", "team/web", "proxy-hub/app")

    def _start_other_server(self, url: str, name: str, *repos: str) -> None:
        """Starts a server that stands for `url`. It has an admin `name`, whose password is in the file `pw`."""
        folder = self.folder / "other"
        folder.mkdir()
        (self.folder / "pw").write_text(OLD_PASSWORD)
        entrepot_output("user", "add", name, "--admin", "--password-file", "-", folder=folder, stdin_text=OLD_PASSWORD)
        server = self._stack.enter_context(running_server(folder, workers=1))
        self.addresses[url] = server.url
        login = b64encode(f"{name}:{OLD_PASSWORD}".encode()).decode()
        for repo in repos:
            RegistryClient(server.address, f"Basic {login}").push(repo, "2", image(repo))

    def write_old_settings(self) -> None:
        """Writes the settings file of a registry:2 server."""
        file = self.folder / "etc" / "docker" / "registry" / "config.yml"
        file.parent.mkdir(parents=True)
        file.write_text(OLD_CONFIG)


async def _leave_garbage(store: StoredRegistry, clock: Clock) -> None:
    """Leaves a blob to which no manifest has referred for two days, and an upload that stopped three weeks ago."""
    now = clock.now
    clock.now = now - 21 * DAY
    upload = await store.start_upload(RepositoryName("team/web"))
    await upload.write(b"x" * 100_000)
    await upload.aclose()
    clock.now = now - 2 * DAY
    await push_blob(store, APP, b"y" * 200_000)


async def _overwrite_tag(store: StoredRegistry, clock: Clock) -> None:
    """Pushes an image as alice, three seconds ago, and another image under the same tag as ci, now."""
    now = clock.now
    for seconds, actor in ((3, ALICE), (0, CI)):
        clock.now = now - seconds
        manifest = await push_image(store, APP, actor.name)
        await store.put_manifest(APP, manifest, [Tag("stable")], by=actor)


async def _delete_image(store: StoredRegistry, _: Clock) -> None:
    manifest = await push_image(store, APP, "1.4", "1.4")
    await store.delete_manifest(APP, manifest.digest, by=ALICE)


async def _push_many_tags(store: StoredRegistry, clock: Clock) -> None:
    """Pushes a release, an old tag, an old tag that was pulled yesterday, and ten newer tags."""
    now = clock.now
    ages = {"v1.0": 60, "1841": 57, "1842": 40} | {str(1843 + number): 20 - number for number in range(10)}  # in days
    for tag, age in ages.items():
        clock.now = now - age * DAY
        manifest = await push_image(store, APP, tag, tag)
        if tag == "1842":
            await store.pulls.save([PullCount(APP, manifest.digest, "", now - DAY, 3)])


async def _push_tags(store: StoredRegistry, *tags: str) -> None:
    for tag in tags:
        await push_image(store, APP, tag, tag)


def _one_moving_tag() -> UpstreamContent:
    content = UpstreamContent()
    content.add("org/app", noise_image("first", 1000), "1")
    return content


def _one_image() -> UpstreamContent:
    content = UpstreamContent()
    content.add("library/ubuntu", noise_image("ubuntu", 1_000_000), "24.04")
    return content


def _four_images() -> UpstreamContent:
    content = UpstreamContent()
    for number, size in enumerate((600_000, 900_000, 500_000, 1_000_000), start=1):
        content.add(f"library/app{number}", noise_image(f"app{number}", size), "1")
    return content


PREPARATIONS: dict[str, Callable[[Place], None]] = {
    "garbage": lambda place: place.fill(_leave_garbage),
    "overwritten tag": lambda place: place.fill(_overwrite_tag),
    "deleted image": lambda place: place.fill(_delete_image),
    "many tags": lambda place: place.fill(_push_many_tags),
    "immutable tag": lambda place: place.fill(lambda store, _: _push_tags(store, "v1", "v1-fixed")),
    "upstream that moves a tag": lambda place: place.start_upstream("https://ghcr.io", _one_moving_tag()),
    "cooldown": Place.move_upstream_tag,
    "upstream with images": lambda place: place.start_upstream("https://docker.io", _four_images()),
    "cached images": Place.pull_images,
    "team": Place.wait_for_quota,  # the section about the quota of a team
    "damaged blob": Place.damage_blob,
    "lost blob": Place.lose_blob,
    "content to back up": lambda place: place.fill(lambda store, _: _push_tags(store, "1", "2")),
    "image to move": Place.push_one,
    "old registry": Place.write_old_registry,
    "old settings": Place.write_old_settings,
    "harbor": Place.start_harbor,
    "upstream with an image": lambda place: place.start_upstream("https://docker.io", _one_image()),
}
"""The functions that make the preparations. On a page, the mark `test: NAME` of a block names its preparation."""
