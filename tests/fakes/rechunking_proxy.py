"""A proxy in front of a fake Hub that changes how the bodies of blobs are framed (`RechunkingProxy`). Real proxies and
CDNs do so if they send a body on before they know its length."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit


@dataclass
class RechunkingProxy:
    """What the proxy does to requests for blobs; it passes all other requests on. Tests may change the fields.

    - `get_lengths`, `head_lengths`: whether responses to GET and to HEAD have a Content-Length.
    - `ranges`: `ignored` sends whole blobs with status 200, `refused` answers a Range with status 416.
    - `ending`: what ends a body without a length: its last chunk, or the close of the connection.
    - `digests`: whether responses have the header Docker-Content-Digest.
    - `page`: a media type, and a body that is sent with status 200 in place of each blob.
    - `ranges_requested`: the Range header of each GET of a blob that has arrived; empty for none."""

    url: str = ""
    get_lengths: bool = False
    head_lengths: bool = True
    ranges: Literal["honoured", "ignored", "refused"] = "ignored"
    ending: Literal["chunked", "close"] = "chunked"
    digests: bool = True
    page: tuple[str, bytes] | None = None
    ranges_requested: list[str] = field(default_factory=list)


@contextlib.contextmanager
def rechunking_proxy(upstream_url: str) -> Iterator[RechunkingProxy]:
    """Runs a proxy in front of the upstream at this URL until the block ends."""
    proxy = RechunkingProxy()
    upstream = urlsplit(upstream_url).netloc

    class Handler(_Handler):
        def pass_on(self) -> None:
            _pass_on(self, proxy, upstream)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        proxy.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def pass_on(self) -> None:
        raise NotImplementedError

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the mirror has closed the connection
            super().handle()

    def do_GET(self) -> None:
        self.pass_on()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def _pass_on(handler: BaseHTTPRequestHandler, proxy: RechunkingProxy, upstream: str) -> None:
    """Sends one request on, and sends its response to the client with the changes that `proxy` says."""
    is_blob = "/blobs/" in handler.path
    sent = {name: handler.headers[name] for name in ("Authorization", "Accept", "Range") if handler.headers[name]}
    if is_blob and handler.command == "GET":
        proxy.ranges_requested.append(sent.get("Range", ""))
    if is_blob and proxy.ranges == "ignored":
        sent.pop("Range", None)
    if is_blob and proxy.ranges == "refused" and "Range" in sent:
        _send(handler, 416, [("Content-Length", "0")], b"", chunked=False)
        return
    connection = http.client.HTTPConnection(upstream, timeout=60)
    try:
        connection.request(handler.command, handler.path, headers=sent)
        response = connection.getresponse()
        body, headers = response.read(), response.getheaders()
    finally:
        connection.close()
    if not is_blob or response.status not in (200, 206):
        _send(handler, response.status, headers, body, chunked=False)
        return
    is_head = handler.command == "HEAD"
    dropped = {"connection"}
    has_length = proxy.head_lengths if is_head else proxy.get_lengths
    if not has_length:
        dropped.add("content-length")
    if not proxy.digests:
        dropped.add("docker-content-digest")
    headers = [(name, value) for name, value in headers if name.lower() not in dropped]
    if proxy.page is not None and not is_head:
        headers = [("Content-Type", proxy.page[0])]
        body = proxy.page[1]
    chunked = not has_length and not is_head and proxy.ending == "chunked"
    if chunked:
        headers.append(("Transfer-Encoding", "chunked"))
    elif not has_length:
        headers.append(("Connection", "close"))
    _send(handler, response.status, headers, body, chunked=chunked)


def _send(
    handler: BaseHTTPRequestHandler, status: int, headers: Sequence[tuple[str, str]], body: bytes, *, chunked: bool
) -> None:
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)  # closes the connection after the response if it is `Connection: close`
    handler.end_headers()
    if not chunked:
        handler.wfile.write(body)
        return
    for start in range(0, len(body), 100_000):
        piece = body[start : start + 100_000]
        handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    handler.wfile.write(b"0\r\n\r\n")
