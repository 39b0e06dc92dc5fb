"""Clients for load tests: they push, mount, tag, delete and pull at random, and record what the server has
acknowledged.

Each client has two repositories of its own, so it can check that everything the server acknowledged is still there. No
retention rule applies to `kept/…`; one applies to `scratch/…`. The images of all clients share some layers. In
addition, all clients push and soon delete a few identical images, so that the same blobs are pushed and
garbage-collected at the same time.
"""

from __future__ import annotations

import random
import threading
import traceback
from dataclasses import dataclass, field

from tests.fakes.raw_http import RawAnswer, RawConnection
from tests.fakes.raw_pushes import OCI_INDEX, OCI_MANIFEST, describe, digest_of, encode, image

SHARED_LAYERS = 12
"""The number of layers that the images of all clients share."""
LAYER_BYTES = 40_000
SHORT_LIVED_IMAGES = 12
"""The number of images that all clients push and soon delete."""
TAGS = 6
"""The number of tags in each repository."""


def shared_layer(number: int) -> bytes:
    """Returns one of the layers that the images of all clients share."""
    return random.Random(f"layer {number}").randbytes(LAYER_BYTES)


@dataclass
class Acknowledged:
    """The manifests and tags that the server has acknowledged. `manifests`: by repository and digest, the media type,
    the digests of the blobs, and the digests of the child manifests. `tags`: by repository and tag, the digest."""

    manifests: dict[tuple[str, str], tuple[str, tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    tags: dict[tuple[str, str], str] = field(default_factory=dict)


@dataclass
class Counts:
    """Counts that show how much load there was: manifests that were pushed or refused, deletions, images pulled with
    all their blobs, images pulled through the mirror (`mirrored`), and mounted blobs."""

    pushed: int = 0
    refused: int = 0
    deleted: int = 0
    pulled: int = 0
    mirrored: int = 0
    mounted: int = 0


class BusyClient:
    """One client, in a thread of its own. `failure` describes the error that ended the client, or is None."""

    def __init__(self, port: int, number: int, stop: threading.Event, mirrored: tuple[str, ...] = ()) -> None:
        self.name = f"client {number}"
        self._thread = threading.Thread(target=self._run, name=self.name)
        self._port = port
        self._random = random.Random(number)
        self._stop = stop
        self._mirrored = mirrored
        self.kept, self.scratch = f"kept/app{number}", f"scratch/app{number}"
        self.acknowledged = Acknowledged()
        self.counts = Counts()
        self.failure: str | None = None

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                with RawConnection(("127.0.0.1", self._port)) as wire:
                    for _ in range(20):
                        self._act(wire)
                        if self._stop.is_set():
                            break
        except BaseException as error:
            where = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
            self.failure = f"{self.name}: {' '.join(where)}: {type(error).__name__}: {error}"

    def _act(self, wire: RawConnection) -> None:
        """Does one random action."""
        chance = self._random.random()
        repo = self._random.choice((self.kept, self.scratch))
        if chance < 0.2:
            self._push_short_lived_image(wire)
        elif chance < 0.45:
            self._push_image(wire, repo, self._tag())
        elif chance < 0.55:
            self._push_index(wire, repo, self._tag())
        elif chance < 0.65:
            self._delete(wire, repo)
        elif chance < 0.75 and self._mirrored:
            self._pull_mirrored(wire, self._random.choice(self._mirrored))
        else:
            self._pull(wire)

    def _tag(self) -> str:
        return f"t{self._random.randrange(TAGS)}"

    def _ensure_blob(self, wire: RawConnection, repo: str, data: bytes) -> None:
        """Makes sure that the repository has the blob. Starts at random with a HEAD request, a mount or an upload.
        After a HEAD that does not find the blob, tries a mount. After a failed mount, uploads the blob."""
        digest = digest_of(data)
        chance = self._random.random()
        if chance < 0.3 and wire.ask("HEAD", f"/v2/{repo}/blobs/{digest}").status == 200:
            return
        if chance < 0.5:
            source = self._random.choice((self.kept, self.scratch))
            answer = wire.ask("POST", f"/v2/{repo}/blobs/uploads/?mount={digest}&from={source}")
            if answer.status == 201:
                self.counts.mounted += 1
                return
        else:
            answer = wire.ask("POST", f"/v2/{repo}/blobs/uploads/")
        expect(answer, 202)
        expect(wire.ask("PUT", f"{answer['location']}?digest={digest}", body=data), 201)

    def _push_image(self, wire: RawConnection, repo: str, reference: str | None) -> str | None:
        """Pushes an image with two shared layers and one layer of its own. Returns its digest, or None if the server
        refused the manifest because the garbage collection had already removed one of its blobs."""
        config = b'{"architecture":"amd64","os":"linux","n":%d}' % self._random.getrandbits(60)
        layers = [shared_layer(number) for number in self._random.sample(range(SHARED_LAYERS), 2)]
        layers.append(self._random.randbytes(2_000))
        for data in (config, *layers):
            self._ensure_blob(wire, repo, data)
        blobs = tuple(digest_of(data) for data in (config, *layers))
        return self._put(wire, repo, reference, image(config, *layers), OCI_MANIFEST, blobs, ())

    def _push_short_lived_image(self, wire: RawConnection) -> None:
        """Pushes an image that other clients push too, pulls it, and deletes it."""
        number = self._random.randrange(SHORT_LIVED_IMAGES)
        blobs = b'{"brief":%d}' % number, random.Random(f"brief {number}").randbytes(LAYER_BYTES)
        for data in blobs:
            self._ensure_blob(wire, self.kept, data)
        digests = tuple(digest_of(data) for data in blobs)
        digest = self._put(wire, self.kept, None, image(*blobs), OCI_MANIFEST, digests, ())
        if digest is not None:
            self.pull_whole(wire, self.kept, digest)
            self._delete_manifest(wire, self.kept, digest)

    def _push_index(self, wire: RawConnection, repo: str, tag: str) -> None:
        """Pushes two images and an index of them."""
        bodies = []
        for _ in range(2):
            digest = self._push_image(wire, repo, None)
            if digest is None:
                return
            answer = wire.ask("GET", f"/v2/{repo}/manifests/{digest}")
            if answer.status == 404 and repo == self.scratch:
                return  # retention has deleted the untagged child already
            expect(answer, 200)
            bodies.append(answer.body)
        index = encode(
            {
                "schemaVersion": 2,
                "mediaType": OCI_INDEX,
                "manifests": [describe(body, OCI_MANIFEST, platform={"os": "linux"}) for body in bodies],
            }
        )
        self._put(wire, repo, tag, index, OCI_INDEX, (), tuple(digest_of(body) for body in bodies))

    def _put(
        self,
        wire: RawConnection,
        repo: str,
        reference: str | None,
        body: bytes,
        media_type: str,
        blobs: tuple[str, ...],
        children: tuple[str, ...],
    ) -> str | None:
        """Puts a manifest. Returns its digest, or None if the server refused it because a blob is missing."""
        digest = digest_of(body)
        answer = wire.ask("PUT", f"/v2/{repo}/manifests/{reference or digest}", {"Content-Type": media_type}, body)
        if answer.status == 404 and answer.codes == ["MANIFEST_BLOB_UNKNOWN"]:
            self.counts.refused += 1
            return None
        expect(answer, 201)
        self.counts.pushed += 1
        self.acknowledged.manifests[repo, digest] = media_type, blobs, children
        if reference is not None:
            self.acknowledged.tags[repo, reference] = digest
        return digest

    def _delete(self, wire: RawConnection, repo: str) -> None:
        """Deletes a tag, or a manifest that no acknowledged index lists."""
        acknowledged = self.acknowledged
        tags = [tag for name, tag in acknowledged.tags if name == repo]
        if tags and self._random.random() < 0.5:
            tag = self._random.choice(tags)
            del acknowledged.tags[repo, tag]
            expect(wire.ask("DELETE", f"/v2/{repo}/manifests/{tag}"), 202, 404)
        else:
            listed = {child for _, _, children in acknowledged.manifests.values() for child in children}
            digests = [digest for name, digest in acknowledged.manifests if name == repo and digest not in listed]
            if not digests:
                return
            self._delete_manifest(wire, repo, self._random.choice(digests))
            return
        self.counts.deleted += 1

    def _delete_manifest(self, wire: RawConnection, repo: str, digest: str) -> None:
        """Deletes a manifest. Removes it and its tags from `acknowledged` before."""
        acknowledged = self.acknowledged
        del acknowledged.manifests[repo, digest]
        acknowledged.tags = {
            key: value for key, value in acknowledged.tags.items() if (key[0], value) != (repo, digest)
        }
        expect(wire.ask("DELETE", f"/v2/{repo}/manifests/{digest}"), 202, 404)
        self.counts.deleted += 1

    def _pull(self, wire: RawConnection) -> None:
        """Pulls a random acknowledged manifest."""
        if not self.acknowledged.manifests:
            return
        repo, digest = self._random.choice(list(self.acknowledged.manifests))
        self.pull_whole(wire, repo, digest)

    def pull_whole(self, wire: RawConnection, repo: str, digest: str) -> bool:
        """Pulls an acknowledged manifest with its blobs and children. Returns False if a retention rule has deleted the
        manifest. As long as the manifest exists, all its blobs and children must exist too."""
        _, blobs, children = self.acknowledged.manifests[repo, digest]
        path = f"/v2/{repo}/manifests/{digest}"
        answer = wire.ask("GET", path)
        is_deleted = answer.status == 404
        if not is_deleted:
            expect(answer, 200)
            assert digest_of(answer.body) == digest
            is_deleted = not (self._pull_blobs(wire, repo, blobs) and self._pull_children(wire, repo, children))
        if is_deleted:
            assert repo == self.scratch, f"something of {repo}@{digest} is gone"
            expect(wire.ask("GET", path), 404)  # if a blob or child is missing, the manifest must be missing too
            del self.acknowledged.manifests[repo, digest]
            return False
        self.counts.pulled += 1
        return True

    def _pull_blobs(self, wire: RawConnection, repo: str, blobs: tuple[str, ...]) -> bool:
        """Pulls the blobs of an image. Returns False if one of them is missing."""
        for blob in blobs:
            answer = wire.ask("GET", f"/v2/{repo}/blobs/{blob}")
            if answer.status == 404:
                return False
            expect(answer, 200)
            assert digest_of(answer.body) == blob
        return True

    def _pull_children(self, wire: RawConnection, repo: str, children: tuple[str, ...]) -> bool:
        """Pulls the images of an index. Returns False if one of them is missing."""
        return all(
            (repo, child) in self.acknowledged.manifests and self.pull_whole(wire, repo, child) for child in children
        )

    def _pull_mirrored(self, wire: RawConnection, name: str) -> None:
        """Pulls an image through the mirror while another command evicts images from its cache."""
        answer = wire.ask("GET", f"/v2/{name}/manifests/latest")
        expect(answer, 200)
        document = answer.json()
        for blob in (document["config"], *document["layers"]):
            answer = wire.ask("GET", f"/v2/{name}/blobs/{blob['digest']}")
            expect(answer, 200)
            assert digest_of(answer.body) == blob["digest"]
        self.counts.mirrored += 1


def expect(answer: RawAnswer, *statuses: int) -> None:
    """Checks that the response has one of these statuses."""
    assert answer.status in statuses, f"{answer.status} {answer.body[:300]!r}"
