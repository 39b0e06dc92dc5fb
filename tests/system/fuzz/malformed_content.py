"""Generators of requests that are valid HTTP, but have malformed content: names, digests, tags, queries, ranges,
manifests. Each function in `CONTENTS` returns one random case of its kind, for the fuzz tests."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from tests.fakes.raw_http import chunked, message
from tests.fakes.raw_pushes import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, describe
from tests.system.fuzz.fuzz_case import SESSION_PLACEHOLDER, FuzzCase

REPO = "fuzz/there"
"""A repository that has BLOB, and a manifest with this blob under TAG."""
BLOB = b"{}"
TAG = "tag"
BLOB_DIGEST = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
UNKNOWN = "sha256:" + "12" * 32
"""A digest that the repository does not have."""

Random = random.Random
Document = dict[str, Any]


def _statuses(*numbers: int) -> frozenset[int]:
    return frozenset(numbers)


def _session_body(rng: Random) -> bytes:
    return rng.randbytes(rng.choice([0, 1, 10, 1000]))


def _spoil(rng: Random, text: str, spoilers: list[str]) -> str:
    """Returns `text` with one of `spoilers` inserted at some position."""
    at = rng.randint(0, len(text))
    return text[:at] + rng.choice(spoilers) + text[at:]


# Texts that make a name invalid if they are inserted.
NAME_SPOILERS = ["A", "..", "%20", "%2F", "%2f", "%00", "%ff", "%C3%A4", "~", ":", "@", "+", "$", "___", ".-", "%0d%0a"]
NAME_SPOILERS += ["*", "%5c", "n" * 256, "%2e%2e", "%E2%80%AE", "!", "'", "(", "|", "`", "^", "%25"]


def bad_name(rng: Random) -> FuzzCase:
    name = _spoil(rng, "team/app", NAME_SPOILERS)
    if rng.random() < 0.2:
        name = rng.choice(["-x", "x-", ".x", "x.", "x//y", "/x", "x/", "_x", "x_", "x/_y", "X", "%41"])
    method, rest = rng.choice(
        [
            ("GET", f"manifests/{TAG}"),
            ("HEAD", f"manifests/{TAG}"),
            ("PUT", f"manifests/{TAG}"),
            ("DELETE", f"manifests/{TAG}"),
            ("GET", f"blobs/{BLOB_DIGEST}"),
            ("DELETE", f"blobs/{BLOB_DIGEST}"),
            ("POST", "blobs/uploads/"),
            ("POST", f"blobs/uploads/?digest={BLOB_DIGEST}"),
            ("POST", f"blobs/uploads/?mount={BLOB_DIGEST}"),
            ("GET", "tags/list"),
            ("GET", f"referrers/{BLOB_DIGEST}"),
        ]
    )
    return FuzzCase("bad name", message(method, f"/v2/{name}/{rest}"), _statuses(400, 404))


def bad_mount_source(rng: Random) -> FuzzCase:
    source = rng.choice(["A", "..", "a%2F%2Fb", "%00", "%ff", "-", "a" * 300, "a%20b", "%2Fetc%2Fpasswd"])
    target = f"/v2/{REPO}/blobs/uploads/?mount={BLOB_DIGEST}&from={source}"
    return FuzzCase("bad mount source", message("POST", target), _statuses(400))


TAG_SPOILERS = [
    "%20",
    "%00",
    "%2F",
    "%2f..%2f",
    "@",
    "%ff",
    "%C3%A4",
    "+",
    "!",
    "%25",
    "x" * 129,
    "%0a",
    "~",
    "%5C",
    "*",
]


def bad_tag(rng: Random) -> FuzzCase:
    tag = _spoil(rng, "v1.0", TAG_SPOILERS) if rng.random() < 0.8 else rng.choice([".x", "-x", "", ".", "..", "%2e%2e"])
    method = rng.choice(["GET", "HEAD", "PUT", "DELETE"])
    return FuzzCase("bad tag", message(method, f"/v2/{REPO}/manifests/{tag}"), _statuses(400, 404))


def _bad_digest(rng: Random) -> str:
    hexes = "".join(rng.choices("0123456789abcdef", k=64))
    return rng.choice(
        [
            "sha256:" + hexes[: rng.randint(0, 63)],
            "sha256:" + hexes + "0",
            "sha256:" + hexes[:63] + rng.choice("gGAZ%;:-_~"),
            "sha512:" + hexes,
            "sha1:" + hexes[:40],
            "SHA256:" + hexes,
            "sha256-" + hexes + ":",
            ":" + hexes,
            "sha256::" + hexes,
            "sha256:" + hexes[:60] + "%00aa",
            "sha256%3A%3A" + hexes,
            "sha256:" + hexes[:62] + "%C3%A4",
            "x" * 5000 + ":" + hexes,
            "sha256:..%2f" + hexes,
        ]
    )


def bad_digest(rng: Random) -> FuzzCase:
    digest = _bad_digest(rng)
    # A reference with a colon is a digest. The colon after the digest makes sure that the reference is not a valid tag.
    method, target = rng.choice(
        [
            ("GET", f"blobs/{digest}"),
            ("HEAD", f"blobs/{digest}"),
            ("DELETE", f"blobs/{digest}"),
            ("GET", f"manifests/{digest}:"),
            ("PUT", f"manifests/{digest}:"),
            ("GET", f"referrers/{digest}"),
            ("POST", f"blobs/uploads/?digest={digest}"),
            ("POST", f"blobs/uploads/?mount={digest}"),
        ]
    )
    return FuzzCase("bad digest", message(method, f"/v2/{REPO}/{target}"), _statuses(400, 404))


def bad_closing_digest(rng: Random) -> FuzzCase:
    digest = rng.choice([_bad_digest(rng), "", f"{BLOB_DIGEST}&digest={BLOB_DIGEST}", "%ff"])
    raw = message("PUT", f"{SESSION_PLACEHOLDER.decode()}?digest={digest}", body=_session_body(rng))
    return FuzzCase("bad closing digest", raw, _statuses(400))


def other_digest(rng: Random) -> FuzzCase:
    """A push whose digest is valid, but is not that of the pushed content."""
    body = rng.randbytes(rng.choice([0, 1, 100, 70_000]))
    digest = rng.choice([UNKNOWN, "sha512:" + "34" * 64])
    target = rng.choice(
        [f"{SESSION_PLACEHOLDER.decode()}?digest={digest}", f"/v2/{REPO}/blobs/uploads/?digest={digest}"]
    )
    method = "POST" if "uploads/?" in target else "PUT"
    if rng.random() < 0.3:
        raw = message(method, target, {"Transfer-Encoding": "chunked"}) + chunked(body[:50], body[50:])
    else:
        raw = message(method, target, body=body)
    return FuzzCase("other digest", raw, _statuses(400))


def unknown_upload(rng: Random) -> FuzzCase:
    uuid = "-".join("".join(rng.choices("0123456789abcdef", k=k)) for k in (8, 4, 4, 4, 12))
    upload = rng.choice(
        [uuid, uuid.upper(), uuid[:-1], uuid + "0", "x", "%00", "%2e%2e", ".", "..%2f..", "a" * 4000, "%ff"]
    )
    method = rng.choice(["GET", "HEAD", "PATCH", "PUT", "DELETE", "POST"])
    headers = rng.choice([{}, {"Content-Range": "0-9"}, {"Content-Range": "5-14"}, {"Expect": "100-continue"}])
    body = rng.choice([b"", b"0123456789"])
    target = f"/v2/{REPO}/blobs/uploads/{upload}?digest={BLOB_DIGEST}"
    return FuzzCase("unknown upload", message(method, target, headers, body), _statuses(400, 404, 405))


def bad_content_range(rng: Random) -> FuzzCase:
    content_range = rng.choice(
        [
            "bytes 0-9/10",
            "bytes=0-9",
            "9-0",
            "0-",
            "-9",
            "",
            "a-b",
            "0-9,10-19",
            "0--9",
            "0 -9",
            "0-9/*",
            "+0-9",
            "0x0-0x9",
            "0-" + "9" * 5000,
            "5-14",
            "1-10",
            "0-8",
            "0-10",
            f"{10**30}-{10**30 + 9}",
            "00-9a",
            "\t",
            "0-9ä",
            "\u0660-\u0669",
        ]
    )
    content_range = content_range.encode("utf-8").decode("latin-1")  # `message` encodes headers as Latin-1
    method = rng.choice(["PATCH", "PUT"])
    target = SESSION_PLACEHOLDER.decode() + (f"?digest={BLOB_DIGEST}" if method == "PUT" else "")
    return FuzzCase(
        "bad content range",
        message(method, target, {"Content-Range": content_range}, b"0123456789"),
        _statuses(400, 416),
    )


def bad_range(rng: Random) -> FuzzCase:
    if rng.random() < 0.2:
        ranges = "bytes=" + ",".join(["0-0"] * rng.randint(1025, 3000))  # the server accepts up to 1024 ranges
        return FuzzCase(
            "bad range", message("GET", f"/v2/{REPO}/blobs/{BLOB_DIGEST}", {"Range": ranges}), _statuses(400)
        )
    ranges = rng.choice(["2-", "1-0", "-0", "999-", f"{10**40}-", "2-3,5-9", "1-0,2-1", f"{'9' * 4000}-"])
    raw = message("GET", f"/v2/{REPO}/blobs/{BLOB_DIGEST}", {"Range": f"bytes={ranges}"})
    return FuzzCase("bad range", raw, _statuses(416))


def bad_query(rng: Random) -> FuzzCase:
    tags = "&".join(f"tag=v{number}" for number in range(rng.randint(101, 400)))
    method, target = rng.choice(
        [
            (
                "GET",
                f"{REPO}/tags/list?n=" + rng.choice(["-1", "x", "1.5", "", "%31%00", "1e3", "0x1", "9" * 25, "+1"]),
            ),
            ("GET", f"{REPO}/tags/list?n=1&n=2"),
            ("GET", f"{REPO}/tags/list?last=" + rng.choice(["%ff", "%00", "%", "%z1", "%C3", "a&last=b"])),
            ("GET", "_catalog?" + rng.choice(["n=-5", "n=x", "last=%fe", "%ff=1", "a=%", "n=1&n=1"])),
            ("GET", f"{REPO}/referrers/{UNKNOWN}?artifactType=" + rng.choice(["%ff", "%00", "a&artifactType=b", "%"])),
            ("GET", f"{REPO}/manifests/{TAG}?x=%zz"),
            ("HEAD", f"{REPO}/blobs/{BLOB_DIGEST}?%"),
            (
                "POST",
                f"{REPO}/blobs/uploads/?digest-algorithm=" + rng.choice(["md5", "", "SHA256", "%00", "sha256,sha512"]),
            ),
            ("POST", f"{REPO}/blobs/uploads/?digest-algorithm=sha512&mount={BLOB_DIGEST}"),
            ("POST", f"{REPO}/blobs/uploads/?digest={BLOB_DIGEST}&digest={BLOB_DIGEST}"),
            ("PUT", f"{REPO}/manifests/{UNKNOWN}?{tags}"),
            ("PUT", f"{REPO}/manifests/{UNKNOWN}?tag=" + rng.choice([".x", "", "a%20b", "%ff", "a%2fb", "x" * 200])),
        ]
    )
    return FuzzCase("bad query", message(method, f"/v2/{target}"), _statuses(400, 414))


def path_trick(rng: Random) -> FuzzCase:
    path = rng.choice(
        [
            "/v2/../etc/passwd",
            "/v2/..%2f..%2fetc%2fpasswd",
            "/v2//manifests/x",
            "/v2/%2e%2e/",
            "/v2/./",
            "//v2/",
            "/v2//",
            "/v2/%00",
            "/v2/a/manifests/..%2f..%2fx",
            "/v2/..;/x",
            "/v2\\..\\x",
            "/V2/",
            "/v3/",
            "/v2x/",
            "/v1/_pong",
            "/%2f",
            "/v2/a/b/c",
            "/v2/a/blobs/",
            "/v2/a/manifests",
            "/v2/_catalog/",
            "/v2/_catalog/x",
            "/v2/a/tags/list/",
            "/v2/%",
            "/v2/a/tags/",
            "/v2/_x/y/z",
            "/v2/a/_oci/x",
            "/v2/tags/list",
            "/v2/manifests/x",
            "/v2/blobs/uploads/",
            "/%ff",
            "/v2/" + "a/" * 3000,
            "/v2/" + "%2e" * 3000,
            "/v2/a/blobs/uploads/../x",
            "/v2/a/blobs/uploads//",
            "/..%5c..%5c",
            "/.git/config",
            "/api/../v2",
            "/static/..%2f..%2fentrepot.db",
            "/health/live/",
            "/%00",
            "/api/%ff",
            "/v2/a%2fb/x",
        ]
    )
    method = rng.choice(["GET", "GET", "HEAD", "PUT", "POST", "DELETE", "PATCH"])
    return FuzzCase("path trick", message(method, path), _statuses(400, 404, 405))


def bad_method_for_path(rng: Random) -> FuzzCase:
    method, path = rng.choice(
        [
            ("POST", "/"),
            ("DELETE", "/health/live"),
            ("PUT", "/health/ready"),
            ("POST", "/api/openapi.json"),
            ("PUT", "/v2/"),
            ("DELETE", "/v2/_catalog"),
            ("POST", f"/v2/{REPO}/manifests/{TAG}"),
            ("PATCH", f"/v2/{REPO}/manifests/{TAG}"),
            ("PUT", f"/v2/{REPO}/blobs/{BLOB_DIGEST}"),
            ("GET", f"/v2/{REPO}/blobs/uploads/"),
            ("TRACE", "/v2/"),
            ("PROPFIND", f"/v2/{REPO}/tags/list"),
            ("LOCK", "/"),
        ]
    )
    return FuzzCase("bad method for path", message(method, path), _statuses(405))


def bad_condition(rng: Random) -> FuzzCase:
    headers = rng.choice(
        [
            {"If-Match": "no quotes"},
            {"If-None-Match": '"open'},
            {"If-Match": "*", "If-None-Match": "*"},
            {"If-Match": ""},
            {"If-Match": '"sha256:other"'},
            {"If-None-Match": "*"},
            {"If-Match": "\xff\xfe"},
        ]
    )
    raw = message("PUT", f"/v2/{REPO}/manifests/{TAG}", {"Content-Type": OCI_MANIFEST, **headers}, valid_manifest())
    return FuzzCase("bad condition", raw, _statuses(400, 412))


def valid_document() -> Document:
    return {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": describe(BLOB, OCI_CONFIG),
        "layers": [describe(BLOB, OCI_LAYER)],
    }


def valid_manifest() -> bytes:
    return json.dumps(valid_document()).encode()


WRONG_VALUES: list[Any] = [
    None,
    True,
    -1,
    1.5,
    "",
    "text",
    [],
    {},
    [[]],
    {"a": {}},
    10**30,
    "\ud800",
    "sha256:x",
    1e308,
]
UNKNOWN_LAYER = {"mediaType": OCI_LAYER, "digest": UNKNOWN, "size": 2}

Spoiler = Callable[[Random, Document], None]
"""A function that makes a valid manifest invalid."""


def _wrong_value(rng: Random, *accepted: Any) -> Any:
    """Returns a JSON value of a wrong type. `accepted`: values that are left out, because the registry accepts them."""
    return rng.choice([value for value in WRONG_VALUES if not any(value is each or value == each for each in accepted)])


DOCUMENT_SPOILERS: list[Spoiler] = [
    lambda rng, d: d.update(schemaVersion=_wrong_value(rng)),
    lambda rng, d: d.pop("schemaVersion"),
    lambda rng, d: d.update(schemaVersion=rng.choice([1, 3, 2.0, "2"])),
    lambda rng, d: d.update(mediaType=_wrong_value(rng, None, "")),
    lambda rng, d: d.update(mediaType=OCI_INDEX),
    lambda rng, d: d.update(config=_wrong_value(rng)),
    lambda rng, d: d.pop("config"),
    lambda rng, d: d.update(layers=_wrong_value(rng, None, [])),
    lambda rng, d: d.update(layers=[_wrong_value(rng)]),
    lambda rng, d: d.update(manifests=[]),
    lambda rng, d: d.update(subject=_wrong_value(rng, None)),
    lambda rng, d: d.update(annotations=_wrong_value(rng, None, {})),
    lambda rng, d: d.update(annotations={"a": _wrong_value(rng, "", "text", "sha256:x")}),
    lambda rng, d: d.update(artifactType=_wrong_value(rng, None, "", "text", "sha256:x")),
    lambda rng, d: d["config"].update(size=_wrong_value(rng)),
    lambda rng, d: d["config"].update(digest=_wrong_value(rng)),
    lambda rng, d: d["config"].pop(rng.choice(["size", "digest", "mediaType"])),
    lambda rng, d: d["layers"].append(UNKNOWN_LAYER),
    lambda rng, d: d["layers"][0].update(mediaType=_wrong_value(rng, "text", "sha256:x")),
    lambda rng, d: d["layers"][0].update(annotations={"x": 1}),
    lambda rng, d: d["layers"][0].update(platform=rng.choice(["linux", [1], 5])),
    lambda rng, d: d["layers"].extend([UNKNOWN_LAYER] * 3000),
]


def bad_manifest(rng: Random) -> FuzzCase:
    document = copy.deepcopy(valid_document())
    rng.choice(DOCUMENT_SPOILERS)(rng, document)
    body = json.dumps(document).encode()
    reference = rng.choice([TAG, "other", UNKNOWN])
    raw = message("PUT", f"/v2/{REPO}/manifests/{reference}", {"Content-Type": OCI_MANIFEST}, body)
    return FuzzCase("bad manifest", raw, _statuses(400, 404))


def _bad_json(rng: Random) -> bytes:
    valid = valid_manifest()
    depth = rng.choice([65, 500, 5000, 60_000])
    return rng.choice(
        [
            valid[: rng.randint(0, len(valid) - 1)],
            valid + rng.choice([b"x", b"{}", b"\0", b","]),
            valid[:-1] + b',"a":' + b"[" * depth + b"]" * depth + b"}",
            valid[:-1] + b',"a":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}",
            b"[" * depth,
            valid[:-1] + b',"schemaVersion":2}',
            valid[:-1] + b',"annotations":{"a":"1","a":"2"}}',
            valid[:-1] + rng.choice([b',"x":NaN}', b',"x":Infinity}', b',"x":-Infinity}', b',"x":01}', b',"x":.5}']),
            valid[:-1] + b',"x":' + b"1" * 5000 + b"}",
            valid[:-1] + b',"annotations":{"a":"\\ud800"}}',
            valid[:-1] + b',"x":"\xff"}',
            valid[:-1] + b',"x":"\x00"}',
            valid[:-1] + b',"x":"a\nb"}',
            b"\xef\xbb\xbf" + valid,
            valid.decode().encode("utf-16"),
            valid.decode().encode("utf-32"),
            rng.choice([b"", b"null", b"[]", b"1", b'"x"', b"{}", b"true", b"\0", b"{'a':1}", b"<xml/>", b"{//\n}"]),
            rng.randbytes(rng.randint(1, 3000)),
        ]
    )


def bad_json(rng: Random) -> FuzzCase:
    kind = rng.choice([{"Content-Type": OCI_MANIFEST}, {"Content-Type": OCI_INDEX}, {}])
    raw = message("PUT", f"/v2/{REPO}/manifests/{TAG}", kind, _bad_json(rng))
    return FuzzCase("bad JSON", raw, _statuses(400))


def bad_media_type(rng: Random) -> FuzzCase:
    given = rng.choice(
        ["text/plain", "x", OCI_INDEX, "\xff\xfe", "a" * 5000, OCI_MANIFEST + "x", "a\tb", "*/*", "\xc3\xa4/b"]
    )
    headers = [("Content-Type", given)]
    if rng.random() < 0.2:
        headers = [("Content-Type", OCI_MANIFEST), ("Content-Type", given)]
    raw = message("PUT", f"/v2/{REPO}/manifests/{TAG}", headers, valid_manifest())
    return FuzzCase("bad media type", raw, _statuses(400))


def too_large_manifest(rng: Random) -> FuzzCase:
    """A request that declares a too large body and does not send it. The server refuses it before it has read the
    body."""
    headers = {"Content-Type": OCI_MANIFEST, "Content-Length": str(rng.choice([8 * 2**20 + 1, 10**9, 2**62]))}
    return FuzzCase("too large manifest", message("PUT", f"/v2/{REPO}/manifests/{TAG}", headers), _statuses(413))


CONTENTS = [
    bad_name,
    bad_mount_source,
    bad_tag,
    bad_digest,
    bad_closing_digest,
    other_digest,
    unknown_upload,
    bad_content_range,
    bad_range,
    bad_query,
    path_trick,
    bad_method_for_path,
    bad_condition,
    bad_manifest,
    bad_json,
    bad_media_type,
    too_large_manifest,
]
