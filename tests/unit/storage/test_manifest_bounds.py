"""What the JSON of a manifest may contain. No manifest blocks the other threads of a process."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable

import pytest

from storage.content import OCI_INDEX, OCI_MANIFEST, JsonAnnotations, Manifest, digest_of
from storage.errors import ManifestInvalid
from storage.json_bounds import BOUNDS, UNCHECKED_BYTES, Bounds, OutOfBounds, check_bounds, load_bounded
from storage.manifest_parser import MAX_REFERENCES, MAX_TYPE_LENGTH

MOST = 8 * 1024 * 1024
"""Bytes of a manifest that is taken."""
HELD_SECONDS = 0.05
"""CPU seconds for which one call may keep the other threads from running."""
EMPTY = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest_of(b"{}"), "size": 2}


def image(**more: object) -> bytes:
    return json.dumps({"schemaVersion": 2, "config": EMPTY, "layers": [], **more}, ensure_ascii=False).encode()


def filled(before: bytes, repeated: bytes, after: bytes = b"", most: int = MOST) -> bytes:
    """Returns an image with a member `x`, as large as a manifest may be."""
    head = image()[:-1] + b',"x":' + before
    return head + repeated * ((most - len(head) - len(after) - 1) // len(repeated)) + after + b"}"


def layers(count: int) -> bytes:
    kind = "application/vnd.oci.image.layer.v1.tar+gzip"
    return image(layers=[{"mediaType": kind, "digest": f"sha256:{n:064x}", "size": n} for n in range(count)])


def names(count: int) -> bytes:
    return b'{"a":1,' + b",".join(b'"%d":1' % n for n in range(count)) + b',"z":1,"z":2}'


WORST: dict[str, Callable[[], bytes]] = {
    "a name twice among many": lambda: names(BOUNDS.values - 10),
    "a name twice among too many": lambda: names(600_000),
    "empty objects": lambda: filled(b"[", b"{},", b"{}]"),
    "empty arrays": lambda: filled(b"[", b"[],", b"[]]"),
    "as many arrays as are taken": lambda: filled(b"[", b"[],", b"[]]", 3 * (BOUNDS.values - 100)),
    "as many objects as are taken": lambda: filled(b"[", b'{"a":0},', b"{}]", 4 * BOUNDS.values - 1000),
    "numbers": lambda: filled(b"[", b"1,", b"1]"),
    "as many fractions as are taken": lambda: filled(b"[", b"0.%s," % (b"1" * 60), b"1]", 60 * BOUNDS.values),
    "a long number": lambda: filled(b"", b"1"),
    "numbers of 4,000 digits": lambda: filled(b"[", b"%s," % (b"1" * 4000), b"1]"),
    "a long fraction": lambda: filled(b"0.", b"1"),
    "brackets": lambda: filled(b"", b"["),
    "braces": lambda: filled(b"", b'{"a":'),
    "quotes": lambda: filled(b"", b'"'),
    "backslashes": lambda: filled(b'"', b"\\\\", b'"'),
    "escaped quotes": lambda: filled(b'"', b'\\"', b'"'),
    "escaped characters": lambda: filled(b'"', b"\\u4e2d", b'"', 6 * BOUNDS.escapes),
    "halves of characters": lambda: filled(b'"', b"\\ud83d", b'"', 6 * BOUNDS.escapes),
    "a long text": lambda: filled(b'"', b"x", b'"'),
    "a long text of wide characters": lambda: filled(b'"', "\U0001f600".encode(), b'"'),
    "a long text that ends with a wide character": lambda: filled(b'"', b"x", "\U0001f600".encode() + b'"'),
    "no UTF-8": lambda: filled(b'"', b"x", b'\xff"'),
    "blanks": lambda: filled(b"", b" ", b"1"),
    "a long name": lambda: image(**{"x" * (MOST - 1000): 1}),
    "a long annotation": lambda: image(annotations={"a": "\U0001f600" + "x" * (MOST - 1000)}),
    "annotations": lambda: image(annotations={f"{n:x}": "" for n in range(BOUNDS.values - 100)}),
    "as many layers as are taken": lambda: layers(MAX_REFERENCES - 1),
    "too many layers": lambda: layers(24_000),
    "a long artifact type": lambda: image(artifactType="x" * (MOST - 1000)),
    "a long media type": lambda: image(mediaType="x" * (MOST - 1000)),
}


class ThreadWatch:
    """Measures the longest time for which this thread could not run although the process did. The time is in CPU
    seconds, so that a busy machine does not count."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        last = time.process_time()
        while not self._ends.wait(0.0005):
            now = time.process_time()
            self.longest = max(self.longest, now - last)
            last = now

    def __enter__(self) -> ThreadWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()


def parse(body: bytes) -> None:
    with contextlib.suppress(ManifestInvalid):
        Manifest.parse(body, OCI_MANIFEST)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORST)
def test_no_manifest_holds_up_the_other_threads(kind: str) -> None:
    """While a manifest of any content is parsed in a thread, the other threads run at least every 50 ms."""
    body = WORST[kind]()
    longest = []
    for _ in range(3):
        with ThreadWatch() as watch:
            parse(body)
        longest.append(watch.longest)
    print(f"{kind}: {min(longest) * 1000:.1f} ms")
    assert min(longest) < HELD_SECONDS


@pytest.mark.parametrize("kind", WORST)
@pytest.mark.slow
def test_every_manifest_is_read_in_time_that_grows_with_its_size(kind: str) -> None:
    """Any manifest is parsed in a second of CPU time."""
    body = WORST[kind]()
    began = time.thread_time()
    parse(body)
    assert time.thread_time() - began < 1.0


def test_a_name_that_stands_twice_is_named() -> None:
    """If an object has a name twice, at any depth, the error tells the name."""
    with pytest.raises(ManifestInvalid, match="names 'z' twice"):
        Manifest.parse(names(10), OCI_MANIFEST)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (filled(b"[", b"{},", b"{}]"), "more than 60000 values"),
        (filled(b'"', b"\\\\", b'"'), "more than 1000000 backslashes"),
        (image()[:-1] + b',"x":' + b"1" * 65 + b"}", "a number of 65 characters; at most 64"),
        (image()[:-1] + b',"x":0.' + b"1" * 64 + b"}", "a number of 66 characters; at most 64"),
        (layers(MAX_REFERENCES + 1), "refers to 10001 blobs and manifests; at most 10000"),
        (image(artifactType="a" * 256), "artifactType has 256 characters; at most 255"),
        (image(config={**EMPTY, "mediaType": "a" * 256}), "a mediaType in config has 256 characters"),
        (image(config={**EMPTY, "artifactType": "a" * 256}), "an artifactType in config has 256 characters"),
        (image(subject={**EMPTY, "mediaType": "a" * 256}), "a mediaType in subject has 256 characters"),
        (image(layers=[{**EMPTY, "mediaType": "a" * 256}]), "a mediaType in layers has 256 characters"),
    ],
)
def test_what_is_too_large_is_refused_by_name(body: bytes, why: str) -> None:
    """The error names the limit that was exceeded, and shows only as much of the manifest as fits into a line."""
    with pytest.raises(ManifestInvalid, match=why) as raised:
        Manifest.parse(body, OCI_MANIFEST)
    assert len(raised.value.message) < 200


def test_a_long_media_type_is_not_repeated() -> None:
    """The error for an unknown media type of a manifest shows only the beginning of a long type."""
    with pytest.raises(ManifestInvalid, match="are not taken here") as raised:
        Manifest.parse(image(mediaType="x" * 100_000), None)
    assert len(raised.value.message) < 200


@pytest.mark.slow
def test_what_real_manifests_hold_is_taken() -> None:
    """These are accepted: types of the length that RFC 6838 allows, indexes with thousands of entries, and documents
    inside annotations."""
    kind = "a" * 127 + "/" + "b" * 127
    assert len(kind) == MAX_TYPE_LENGTH
    assert Manifest.parse(image(artifactType=kind), OCI_MANIFEST).artifact_type == kind
    child = {"mediaType": OCI_MANIFEST, "size": 1, "platform": {"os": "linux", "architecture": "amd64"}}
    children = [{**child, "digest": f"sha256:{n:064x}", "annotations": {"a": "b"}} for n in range(5000)]
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": children}).encode()
    assert len(Manifest.parse(index, OCI_INDEX).manifests) == 5000
    inner = json.dumps([{"name": f'a "quoted" \\ {n}', "of": [n, n]} for n in range(30_000)])  # as an SBOM has it
    assert Manifest.parse(image(annotations={"sbom": inner}), OCI_MANIFEST).annotations["sbom"] == inner


def test_what_was_stored_before_is_still_a_manifest() -> None:
    """Manifests that were stored earlier are not checked again. Parts that would block other threads are not parsed."""
    body = image(artifactType="a" * 1000)
    manifest = Manifest(body, OCI_MANIFEST, digest_of(body))
    assert manifest.is_readable
    assert manifest.artifact_type == "a" * 1000
    large = filled(b"[", b"{},", b"{}]")
    assert not Manifest(large, OCI_MANIFEST, digest_of(large)).is_readable


@pytest.mark.parametrize("cut", range(7))
def test_texts_do_not_count(cut: int) -> None:
    """Braces and other characters inside strings do not count as structure, whatever pieces the check reads."""
    text = json.dumps('[{,}]"\\' * 20_000)
    body = (" " * (UNCHECKED_BYTES + cut) + "[" + text + ",1]").encode()
    check_bounds(body, Bounds(values=3))
    with pytest.raises(OutOfBounds):
        check_bounds(body, Bounds(values=1))


def test_other_documents_are_read_within_bounds() -> None:
    """Lists of tags and other documents from outside are parsed within limits."""
    assert load_bounded(b'{"tags":["a"]}') == {"tags": ["a"]}
    with pytest.raises(OutOfBounds):
        load_bounded(b"[" + b"1," * 200_000 + b"1]")
    with pytest.raises(ValueError, match="64 are taken"):
        load_bounded(b"1" * 4000)


def test_annotations_are_kept_as_they_are_stored() -> None:
    """The annotations of a large manifest are kept as JSON, and read like any others."""
    text = 'é"\\\n\U0001f600' * 5000
    manifest = Manifest.parse(image(annotations={"a": text, "b": ""}), OCI_MANIFEST)
    assert isinstance(manifest.annotations, JsonAnnotations)
    assert dict(manifest.annotations) == {"a": text, "b": ""}
    assert json.loads(manifest.descriptor.as_json_text()) == manifest.descriptor.as_json()
