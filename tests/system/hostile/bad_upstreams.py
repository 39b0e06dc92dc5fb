"""Fake upstream registries that send the most expensive responses, in a separate process.

Each fake upstream has its own port and sends one kind of response, whose name is a key of `ANSWERS`. The server mirrors
each as an upstream of this name, so that the failures of one upstream do not affect the others. A kind of response is a
function that takes the target of the request and yields the bytes to send. After the response, the connection is
closed.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from storage.content import OCI_INDEX, OCI_MANIFEST
from tests.fakes.server_process import ROOT
from tests.system.hostile import costly_bodies

MIB = 1 << 20
Answering = Callable[[str], Iterable[bytes]]
"""The type of a kind of response: from the target of the request to the bytes to send."""
DOMAIN = ".bad.test"
"""The end of the names of all fake upstreams."""
SEARCH = "search"
"""The name of the fake upstream to which the server passes on searches."""


def respond(
    body: bytes, status: str = "200 OK", kind: str = "application/json", headers: Iterable[str] = (), size: int = 0
) -> Iterator[bytes]:
    """Yields a response with Content-Length, in pieces of `size` bytes (0: 1 MiB). `kind`: its Content-Type."""
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers]
    yield ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    step = size or MIB
    for start in range(0, len(body), step):
        yield body[start : start + step]


def chunked(pieces: Iterable[bytes], kind: str = "application/json") -> Iterator[bytes]:
    """Yields a response in chunked transfer coding."""
    yield f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    for piece in pieces:
        yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def manifest(make: Callable[[int], bytes], kind: str = OCI_MANIFEST, size: int = 8 * MIB) -> Answering:
    """Returns a kind of response: the same manifest for every reference. `make` is called with `size` at the first
    request."""
    make_once = lru_cache(maxsize=1)(make)

    def answer(target: str) -> Iterator[bytes]:
        body = make_once(size)
        digest = f"Docker-Content-Digest: sha256:{hashlib.sha256(body).hexdigest()}"
        return respond(body, kind=kind, headers=(digest,))

    return answer


def _endless(target: str) -> Iterator[bytes]:
    """Yields a manifest of 32 MiB of spaces, without Content-Length."""
    return chunked((b" " * MIB for _ in range(32)), OCI_MANIFEST)


def _single_bytes(target: str) -> Iterator[bytes]:
    """Yields a manifest in chunks of one byte."""
    body = costly_bodies.manifest(note="x" * 100_000)
    yield f"HTTP/1.1 200 OK\r\nContent-Type: {OCI_MANIFEST}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    yield b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"


def _long_headers(target: str) -> Iterator[bytes]:
    """Yields a manifest with 490 headers, nearly as many as are accepted."""
    lines = [f"X-Header-{number}: {'v' * 40}" for number in range(490)]
    return respond(costly_bodies.manifest(note=target), kind=OCI_MANIFEST, headers=lines)


def _cookies(target: str) -> Iterator[bytes]:
    """Yields a manifest with 4800 cookies."""
    return respond(costly_bodies.manifest(note=target), kind=OCI_MANIFEST, headers=("Set-Cookie: a=b; c",) * 4800)


def _short_headers(target: str) -> Iterator[bytes]:
    """Yields a manifest with 18,000 very short headers."""
    return respond(costly_bodies.manifest(note=target), kind=OCI_MANIFEST, headers=("a:b",) * 18_000)


def _interim_responses(target: str) -> Iterator[bytes]:
    """Yields 20,000 interim responses before a manifest."""
    yield b"HTTP/1.1 103 \r\n\r\n" * 20_000
    yield from respond(costly_bodies.manifest(note=target), kind=OCI_MANIFEST)


def _trailers(target: str) -> Iterator[bytes]:
    """Yields a manifest with 18,000 very short trailers."""
    body = costly_bodies.manifest(note=target)
    yield f"HTTP/1.1 200 OK\r\nContent-Type: {OCI_MANIFEST}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    yield b"%x\r\n%b\r\n0\r\n" % (len(body), body) + b"a:b\r\n" * 18_000 + b"\r\n"


def _token(body: bytes) -> Answering:
    """Returns a kind of response: a login challenge, whose token service sends `body`."""

    def answer(target: str) -> Iterator[bytes]:
        if target.startswith("/token"):
            return respond(body)
        realm = 'WWW-Authenticate: Bearer realm="http://HOST/token",service="far",scope="repository:a:pull"'
        return respond(b"", "401 Unauthorized", headers=(realm,))

    return answer


def _challenges(target: str) -> Iterator[bytes]:
    """Yields a login challenge with 1500 parameters."""
    noise = ",".join(f'p{number}="{"=" * 20}"' for number in range(1500))
    return respond(b"", "401 Unauthorized", headers=(f"WWW-Authenticate: Bearer {noise}",))


def _quotes(target: str) -> Iterator[bytes]:
    """Yields a login challenge with 15,000 escaped quotes."""
    quotes = '\\"' * 15_000
    return respond(b"", "401 Unauthorized", headers=(f"WWW-Authenticate: Bearer realm={quotes}",))


def _many_challenges(target: str) -> Iterator[bytes]:
    """Yields 490 login challenges."""
    return respond(b"", "401 Unauthorized", headers=("WWW-Authenticate: Basic realm=a",) * 490)


def _tag_pages(target: str) -> Iterator[bytes]:
    """Yields a page with one tag and a link to a next page. The list never ends."""
    number = int(target.rpartition("page=")[2]) + 1 if "page=" in target else 0
    link = f'Link: <{target.partition("?")[0]}?page={number}>; rel="next"'
    return respond(json.dumps({"name": "a", "tags": [f"t{number}"]}).encode(), headers=(link,))


def _tag_loop(target: str) -> Iterator[bytes]:
    """Yields a page of tags whose next page is the same page."""
    link = f'Link: <{target}>; rel="next"'
    return respond(json.dumps({"name": "a", "tags": [f"t{n}" for n in range(1000)]}).encode(), headers=(link,))


_tag_list = lru_cache(maxsize=4)(costly_bodies.upstream_tags)


def _tags(target: str) -> Iterator[bytes]:
    """Yields a list of 8 MiB of tags in one page."""
    return respond(_tag_list(""))


def _tags_of_pages(target: str) -> Iterator[bytes]:
    """Yields one of four large pages of tags."""
    number = int(target.rpartition("page=")[2]) + 1 if "page=" in target else 0
    link = (f'Link: <{target.partition("?")[0]}?page={number}>; rel="next"',) if number < 3 else ()
    return respond(_tag_list(f"p{number}"), headers=link)


_referrer_list = lru_cache(maxsize=2)(costly_bodies.upstream_referrers)


def _referrers(annotated: bool) -> Answering:
    return lambda target: respond(_referrer_list(annotated), kind=OCI_INDEX)


def _gzip_bomb(target: str) -> Iterator[bytes]:
    """Yields a small gzip file that expands to 64 MiB."""
    body = gzip.compress(b" " * (64 * MIB), 9)
    return respond(body, kind=OCI_MANIFEST, headers=("Content-Encoding: gzip",))


def _redirects(target: str) -> Iterator[bytes]:
    """Yields a redirect to itself."""
    return respond(b"", "307 Temporary Redirect", headers=(f"Location: {target.partition('?')[0]}?again",))


def _long_redirect(target: str) -> Iterator[bytes]:
    """Yields a redirect to a very long URL."""
    return respond(b"", "307 Temporary Redirect", headers=(f"Location: /{'%2e/' * 15_000}",))


def _blob(target: str) -> Iterator[bytes]:
    """Yields bytes that do not match the requested digest."""
    return respond(b"wrong" * (MIB // 5), kind="application/octet-stream")


def _blob_bytes(target: str) -> Iterator[bytes]:
    """Yields 25,000 chunks of one byte, which do not match the requested digest. They are more than the server reads at
    once."""
    yield b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-24999/25000\r\nTransfer-Encoding: chunked\r\n\r\n"
    yield b"1\r\nx\r\n" * 25_000 + b"0\r\n\r\n"


def _search_results(target: str) -> Iterator[bytes]:
    """Yields 29,000 search results, although at most 100 are requested."""
    return respond(json.dumps({"results": [{"name": "alpine/x"}] * 29_000}).encode())


def _errors(body: bytes, status: str) -> Answering:
    return lambda target: respond(body, status)


ANSWERS: Mapping[str, Answering] = {
    "repeated-names": manifest(costly_bodies.repeated_names),
    "empty-objects": manifest(costly_bodies.empty_objects),
    "empty-lists": manifest(costly_bodies.empty_lists),
    "deep": manifest(costly_bodies.deep),
    "many-layers": manifest(costly_bodies.many_layers),
    "many-children": manifest(costly_bodies.many_children, OCI_INDEX),
    "annotations": manifest(costly_bodies.many_annotations),
    "escapes": manifest(costly_bodies.escapes),
    "oversize": manifest(costly_bodies.spaces, size=16 * MIB),
    "endless": _endless,
    "single-bytes": _single_bytes,
    "long-headers": _long_headers,
    "cookies": _cookies,
    "short-headers": _short_headers,
    "interim-responses": _interim_responses,
    "trailers": _trailers,
    "token-deep": _token(b"[" * 260_000),
    "token-objects": _token(b'{"a":[' + b"{}," * 80_000 + b"{}]}"),
    "token-long": _token(json.dumps({"token": "t" * 250_000}).encode()),
    "challenge-long": _challenges,
    "challenge-quotes": _quotes,
    "challenge-many": _many_challenges,
    "tag-pages": _tag_pages,
    "tag-loop": _tag_loop,
    "tags-one-page": _tags,
    "tags-large-pages": _tags_of_pages,
    "referrers": _referrers(False),
    "referrers-annotated": _referrers(True),
    "gzip-bomb": _gzip_bomb,
    "redirects": _redirects,
    "long-redirect": _long_redirect,
    "wrong-blob": _blob,
    "blob-bytes": _blob_bytes,
    "error-deep": _errors(b"[" * 65_000, "404 Not Found"),
    "error-codes": _errors(costly_bodies.error_codes(), "404 Not Found"),
    "error-large": _errors(b"<p>" * (4 * MIB), "503 Service Unavailable"),
    SEARCH: _search_results,
}


@dataclass(frozen=True)
class BadUpstreams:
    """The running fake upstreams. `ports`: by the name of their kind of response."""

    ports: Mapping[str, int]

    @staticmethod
    def repository(name: str, rest: str) -> str:
        """Returns the repository name of a bad upstream, as clients request it."""
        return f"{name}{DOMAIN}/{rest}"

    def settings(self) -> str:
        """Returns the settings with which the server mirrors the fake upstreams, as TOML."""
        return "\n".join(
            f'[[upstream]]\nname = "{name}{DOMAIN}"\nendpoints = ["http://127.0.0.1:{port}"]\n'
            + (f'search = "http://127.0.0.1:{port}/v1/search"\n' if name == SEARCH else "")
            for name, port in self.ports.items()
        )


@contextlib.contextmanager
def bad_upstreams(folder: Path) -> Iterator[BadUpstreams]:
    """Runs the fake upstreams in a process during the `with` block."""
    with (folder / "upstreams.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        try:
            yield BadUpstreams(json.loads(process.stdout.readline()))
        finally:
            process.kill()
            process.wait()


# -- The rest runs in the process of the fake upstreams.


def _serve(listener: socket.socket, answering: Answering) -> None:
    """Accepts connections, and answers each in a thread."""
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_answer, args=(sock, answering), daemon=True).start()


def _answer(sock: socket.socket, answering: Answering) -> None:
    """Answers one request. `HOST` in the response is replaced by the address of this fake upstream."""
    host, port = sock.getsockname()
    with sock, contextlib.suppress(OSError):
        received = b""
        while b"\r\n\r\n" not in received:
            data = sock.recv(1 << 16)
            if not data:
                return
            received += data
        method, target, _ = received.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        pieces = iter(answering(target))
        first = next(pieces).replace(b"HOST", f"{host}:{port}".encode())
        sock.sendall(first.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        if method != "HEAD":
            for piece in pieces:
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass


def main() -> None:
    """Prints the ports of the fake upstreams as a line of JSON, and serves until stdin is closed."""
    ports = {}
    for name, answering in ANSWERS.items():
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        ports[name] = listener.getsockname()[1]
        threading.Thread(target=_serve, args=(listener, answering), daemon=True).start()
    sys.stdout.write(json.dumps(ports) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
