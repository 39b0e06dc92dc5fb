"""Functions that return manifests and lists that are expensive to parse. They are valid or nearly valid. `size`: the
number of bytes of the result, approximately."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable
from functools import lru_cache

from storage.content import OCI_INDEX, OCI_MANIFEST

EMPTY = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
"""The digest of the empty JSON object, `{}`."""
CONFIG = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": EMPTY, "size": 2}
LAYER = "application/vnd.oci.image.layer.v1.tar"


def digest(number: int) -> str:
    """Returns a digest that no blob has."""
    return f"sha256:{number:064x}"


def manifest(note: str = "", **more: object) -> bytes:
    """Returns an image manifest whose only blob is the config `{}`. `more`: further members, or other values."""
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": CONFIG, "layers": []}
    return json.dumps({**document, **({"annotations": {"note": note}} if note else {}), **more}).encode()


def _around_value_of(member: str) -> tuple[bytes, bytes]:
    """Returns the bytes of a manifest before and after the value of the additional member."""
    return manifest()[:-1] + f', "{member}": '.encode(), b"}"


def _filled(size: int, member: str, opening: bytes, part: bytes, closing: bytes) -> bytes:
    """Returns a manifest of `size` bytes with an additional member. Its value repeats `part`, separated by commas."""
    prefix, suffix = _around_value_of(member)
    part_bytes = size - len(prefix) - len(suffix) - len(opening) - len(closing)
    count = (part_bytes + 1) // (len(part) + 1)
    return prefix + opening + b",".join([part] * count) + closing + suffix


def _numbered(size: int, member: str, opening: bytes, part: Callable[[int], bytes], closing: bytes) -> bytes:
    """Like `_filled`, with a different part for each number. All parts have the same length."""
    prefix, suffix = _around_value_of(member)
    part_bytes = size - len(prefix) - len(suffix) - len(opening) - len(closing)
    count = (part_bytes + 1) // (len(part(0)) + 1)
    return prefix + opening + b",".join(part(number) for number in range(count)) + closing + suffix


def repeated_names(size: int) -> bytes:
    """An object with many names, of which the last one is repeated."""
    body = _numbered(size - 20, "annotations", b"{", lambda number: b'"%07d":""' % number, b"}")
    return body[:-2] + b"," + body[-14:]  # the last member has 12 bytes, and two closing braces follow


def many_annotations(size: int) -> bytes:
    """A manifest with many small annotations."""
    return _numbered(size, "annotations", b"{", lambda number: b'"a%07d":"b"' % number, b"}")


def one_annotation(size: int) -> bytes:
    """A manifest with one long annotation."""
    prefix, suffix = _around_value_of("annotations")
    return prefix + b'{"a":"' + b"x" * (size - len(prefix) - len(suffix) - 8) + b'"}' + suffix


def empty_objects(size: int) -> bytes:
    """A manifest with many empty JSON objects."""
    return _filled(size, "extra", b"[", b"{}", b"]")


def empty_lists(size: int) -> bytes:
    """A manifest with many empty JSON lists."""
    return _filled(size, "extra", b"[", b"[]", b"]")


def nested_lists(size: int) -> bytes:
    """Many small nested lists, each as deep as the server allows."""
    return _filled(size, "extra", b"[", b"[" * 60 + b"]" * 60, b"]")


def deep(size: int) -> bytes:
    """A manifest with very deeply nested lists."""
    prefix, suffix = _around_value_of("extra")
    depth = (size - len(prefix) - len(suffix)) // 2
    return prefix + b"[" * depth + b"]" * depth + suffix


def opened(size: int) -> bytes:
    """Opening brackets that are never closed."""
    return b"[" * size


def numbers(size: int) -> bytes:
    """A manifest with a list of many integers."""
    return _filled(size, "extra", b"[", b"1", b"]")


def floats(size: int) -> bytes:
    """A manifest with a list of many fractions."""
    return _filled(size, "extra", b"[", b"1.1e-308", b"]")


def long_number(size: int) -> bytes:
    """A manifest with one very long integer."""
    prefix, suffix = _around_value_of("extra")
    return prefix + b"9" * (size - len(prefix) - len(suffix)) + suffix


def long_exponent(size: int) -> bytes:
    """A manifest with a number whose exponent is very long."""
    prefix, suffix = _around_value_of("extra")
    return prefix + b"1e" + b"9" * (size - len(prefix) - len(suffix) - 2) + suffix


def long_fraction(size: int) -> bytes:
    """A manifest with one very long fraction."""
    prefix, suffix = _around_value_of("extra")
    return prefix + b"0." + b"1" * (size - len(prefix) - len(suffix) - 2) + suffix


def literals(size: int) -> bytes:
    """A manifest with a list of many `null`."""
    return _filled(size, "extra", b"[", b"null", b"]")


def not_a_number(size: int) -> bytes:
    """A manifest with a long list that ends with NaN, which is not valid JSON."""
    return _filled(size, "extra", b"[", b"0", b",NaN]")


def escapes(size: int) -> bytes:
    """A manifest with an annotation of many escaped characters."""
    prefix, suffix = _around_value_of("annotations")
    count = (size - len(prefix) - len(suffix) - 8) // 6
    return prefix + b'{"a":"' + b"\\u00e9" * count + b'"}' + suffix


def half_surrogates(size: int) -> bytes:
    """A manifest with an annotation of many halves of surrogate pairs, which are invalid."""
    prefix, suffix = _around_value_of("annotations")
    count = (size - len(prefix) - len(suffix) - 8) // 6
    return prefix + b'{"a":"' + b"\\ud800" * count + b'"}' + suffix


def late_half_surrogate(size: int) -> bytes:
    """Many objects, with half of a surrogate pair, which is invalid, at the end."""
    return _filled(size, "extra", b"[", b"{}", b',"\\ud800"]')


def bad_utf8(size: int) -> bytes:
    """A manifest with a byte at its end that is not valid UTF-8."""
    return one_annotation(size - 1)[:-3] + b"\xff" + b'"}}'


def marked(size: int) -> bytes:
    """A manifest with a byte order mark in front."""
    return b"\xef\xbb\xbf" + empty_objects(size - 3)


def spaces(size: int) -> bytes:
    """A small manifest, filled up with spaces."""
    body = manifest()
    return body[:-1] + b" " * (size - len(body)) + b"}"


def unfinished(size: int) -> bytes:
    """A manifest without its last byte."""
    return empty_objects(size)[:-1]


def many_layers(size: int) -> bytes:
    """Many layers with different digests."""
    return _layers(size, lambda number: digest(number))


def same_layers(size: int) -> bytes:
    """A manifest with many layers that are all the same blob."""
    return _layers(size, lambda number: EMPTY)


def _layers(size: int, digest_at: Callable[[int], str]) -> bytes:
    start = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": CONFIG})[:-1].encode()

    def part(number: int) -> bytes:
        return b'{"mediaType":"%b","digest":"%b","size":2}' % (LAYER.encode(), digest_at(number).encode())

    count = (size - len(start) - 14) // (len(part(0)) + 1)
    return start + b',"layers":[' + b",".join(map(part, range(count))) + b"]}"


def bare_layers(count: int) -> bytes:
    """A manifest with `count` layers, which are all the same existing blob."""
    layer = {"mediaType": "a", "digest": EMPTY, "size": 2}
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": CONFIG, "layers": [layer] * count}
    return json.dumps(document, separators=(",", ":")).encode()


def many_children(size: int) -> bytes:
    """An index of manifests that do not exist."""
    start = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX})[:-1].encode()

    def part(number: int) -> bytes:
        return b'{"mediaType":"%b","digest":"%b","size":2}' % (OCI_MANIFEST.encode(), digest(number).encode())

    count = (size - len(start) - 16) // (len(part(0)) + 1)
    return start + b',"manifests":[' + b",".join(map(part, range(count))) + b"]}"


def platforms(size: int) -> bytes:
    """An index with one entry, whose platform has many members."""
    entry = b'{"mediaType":"x","digest":"%b","size":2,"platform":{' % EMPTY.encode()
    start = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX})[:-1].encode() + b',"manifests":[' + entry
    count = (size - len(start) - 4) // 15  # a member and its comma have 15 bytes
    return start + b",".join(b'"%07d":[[]]' % number for number in range(count)) + b"}}]}"


def long_media_type(size: int) -> bytes:
    """A manifest with a very long artifact type."""
    return manifest(artifactType="a/" + "b" * (size - 1000))


def long_config_type(size: int) -> bytes:
    """A manifest whose config has a very long media type."""
    return manifest(config={**CONFIG, "mediaType": "a/" + "b" * (size - 1000)})


def long_descriptor_type(size: int) -> bytes:
    """A manifest with a layer that has a very long media type."""
    return manifest(layers=[{"mediaType": "nondistributable" * ((size - 1000) // 16), "digest": EMPTY, "size": 2}])


def with_subject(note: str, subject: str, size: int) -> bytes:
    """A referrer with one large annotation."""
    part = {"mediaType": OCI_MANIFEST, "digest": subject, "size": 2}
    return manifest(note=note + "x" * max(0, size - 1000), subject=part, artifactType="application/vnd.example.sbom")


def upstream_tags(mark: str = "") -> bytes:
    """A list of about 8 MiB of unsorted tags."""
    remaining_bytes, tags = (8 << 20) - 100, []
    for number in itertools.count():
        tag = f"{hashlib.sha256(f'{mark}{number}'.encode()).hexdigest()[:8]}"
        remaining_bytes -= len(tag) + 4
        if remaining_bytes < 0:
            break
        tags.append(tag)
    return json.dumps({"name": "a", "tags": tags}).encode()


def upstream_referrers(annotated: bool) -> bytes:
    """An index of about 4 MiB of descriptors. `annotated`: whether each has many small annotations."""
    notes = {f"n{number}": "" for number in range(500)} if annotated else {}
    part = {"mediaType": OCI_MANIFEST, "size": 2, "artifactType": "a/b", "annotations": notes}
    size = len(json.dumps({**part, "digest": EMPTY})) + 2
    entries = [{**part, "digest": digest(number)} for number in range((4 << 20) // size)]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()


def error_codes() -> bytes:
    """About 64 KiB of errors in the format of the distribution spec, cut off at the end."""
    return json.dumps({"errors": [{"code": f"X{number:05d}"} for number in range(3200)]}).encode()[: 64 << 10]


@lru_cache(maxsize=1)
def noise(size: int) -> bytes:
    """Random bytes, the same for each call."""
    return random.Random(size).randbytes(size)


@lru_cache(maxsize=1)
def noise_digest(size: int) -> str:
    """The digest of `noise(size)`."""
    return f"sha256:{hashlib.sha256(noise(size)).hexdigest()}"


def unknown_fields(count: int, digits: int) -> bytes:
    """Returns a JSON object with `count` fields whose names are numbers of at least `digits` digits."""
    return b"{" + b",".join(b'"%0*d":1' % (digits, number) for number in range(count)) + b"}"
