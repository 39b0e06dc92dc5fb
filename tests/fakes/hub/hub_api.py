"""The fake Hub's responses to requests of the distribution API. Like Docker Hub's mirror endpoint, it is read-only."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from .hub_answers import HubAnswer, error, part, text
from .hub_connection import HubRequest
from .hub_content import HubContent, HubManifest, HubRepository, MappedBody
from .hub_tokens import HubTokens
from .request_log import RecordedRequest
from .switches import HubRequestKind, Switches

INDEX = "application/vnd.oci.image.index.v1+json"
_PATH = re.compile(r"/v2/(?P<repo>.+)/(?P<what>manifests|blobs|tags|referrers)/(?P<reference>[^/]+)")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class HubTarget:
    """The resource that a path names."""

    kind: HubRequestKind
    repo: str = ""
    reference: str = ""


def target_of(path: str, *, redirects: bool) -> HubTarget:
    """Returns the resource that the path names. `redirects`: whether the Hub redirects requests of blobs to the CDN."""
    if path in ("/v2", "/v2/"):
        return HubTarget("ping")
    if path == "/token":
        return HubTarget("token")
    found = _PATH.fullmatch(path)
    if not found:
        return HubTarget("other")
    kinds: dict[str, HubRequestKind] = {"manifests": "manifest", "tags": "tags", "referrers": "referrers"}
    kind = kinds.get(found["what"], "redirect" if redirects else "blob")
    return HubTarget(kind, found["repo"], found["reference"])


@dataclass
class HubApi:
    """Answers requests with the content `content`, as the switches demand. Counts the GETs of manifests for the rate
    limit, and the requests to each redirect target."""

    content: HubContent
    switches: Switches
    tokens: HubTokens = field(default_factory=HubTokens)
    manifests_given: int = 0
    links: dict[str, int] = field(default_factory=dict)

    def challenge(self, request: HubRequest, target: HubTarget, realm: str) -> HubAnswer | None:
        """Returns a 401 response if the request is not authorized, and None if it is."""
        repo = target.repo
        refusal = self.tokens.refuse(request, repo, self.switches)
        hidden = self.switches.hide_unknown and repo and repo not in self.content.repositories
        if refusal is None and not hidden:
            return None
        if self.switches.auth == "basic":
            challenge = 'Basic realm="registry"'
        else:
            challenge = f'Bearer realm="{self.switches.realms.get(repo, realm)}",service="{self.switches.service}"'
            challenge += f',scope="repository:{repo}:pull"' if repo else ""
            if (refusal is None and repo) or (refusal is not None and refusal.error):
                challenge += f',error="{refusal.error if refusal else "insufficient_scope"}"'
        return error(401, "authentication required", {"WWW-Authenticate": challenge})

    def token(self, request: HubRequest) -> HubAnswer:
        if request.method not in ("GET", "POST"):
            return error(405, "method not allowed")
        token_document = self.tokens.issue(request, self.switches)
        if token_document is None:
            return text(401, '{"details": "incorrect username or password"}\n', "application/json")
        return text(200, json.dumps(token_document), "application/json")

    def answer(self, request: HubRequest, target: HubTarget, record: RecordedRequest, cdn: str) -> HubAnswer:
        """Returns the response to an authorized request, without faults."""
        if target.kind == "ping":
            return text(200, "{}", "application/json", {"Docker-Distribution-Api-Version": "registry/2.0"})
        if request.method not in ("GET", "HEAD"):
            return error(405, "this registry is read only", code="UNSUPPORTED")
        repository = self.content.repositories.get(target.repo)
        if repository is None:
            return error(404, "repository name not known to registry")
        if target.kind == "manifest":
            return self._manifest(request, repository, target.reference, record)
        if target.kind == "tags":
            return self._tags(request, target.repo, repository)
        if target.kind == "referrers":
            return self._referrers(request, target, repository)
        if target.kind in ("blob", "redirect"):
            return self._blob(request, repository, target.reference, record, cdn)
        return error(404, "no such page")

    def _manifest(
        self, request: HubRequest, repository: HubRepository, reference: str, record: RecordedRequest
    ) -> HubAnswer:
        if request.method == "HEAD" and not self.switches.heads:
            return error(405, "no HEAD here", code="UNSUPPORTED")
        manifest = repository.manifest(reference)
        if manifest is None:
            return error(404, f"manifest unknown: {reference}", code="MANIFEST_UNKNOWN")
        if self.switches.negotiates and manifest.media_type not in request.headers.get("accept", ""):
            return error(404, f"{manifest.media_type} found, but not accepted", code="MANIFEST_UNKNOWN")
        headers = self._quota(counts=request.method == "GET")
        if headers is None:
            retry_header = {} if self.switches.retry_after is None else {"Retry-After": str(self.switches.retry_after)}
            return error(429, "you have reached your pull rate limit", {**retry_header, **self._limit_headers()})
        record.digest = manifest.digest
        return self._encoded(request, self._described(manifest, headers))

    def _described(self, manifest: HubManifest, headers: Mapping[str, str]) -> HubAnswer:
        size = len(manifest.body)
        all_headers = {"Content-Type": manifest.media_type, "Content-Length": str(size), **headers}
        all_headers["Docker-Distribution-Api-Version"] = "registry/2.0"
        if self.switches.digests:
            all_headers |= {"Docker-Content-Digest": manifest.digest, "ETag": f'"{manifest.digest}"'}
        return HubAnswer(200, all_headers, MappedBody(manifest.body), 0, size)

    def _quota(self, *, counts: bool) -> dict[str, str] | None:
        """Returns the headers of the rate limit; None if the limit is used up. `counts`: whether the request counts."""
        limit = self.switches.limit
        if limit is not None and counts:
            if self.manifests_given >= limit:
                return None
            self.manifests_given += 1
        return self._limit_headers()

    def _limit_headers(self) -> dict[str, str]:
        limit = self.switches.limit
        if limit is None:
            return {}
        left = max(0, limit - self.manifests_given)
        return {
            # w: the window of the limit in seconds
            "ratelimit-limit": f"{limit};w=21600",
            "ratelimit-remaining": f"{left};w=21600",
            "docker-ratelimit-source": "127.0.0.1",
        }

    def _tags(self, request: HubRequest, repo: str, repository: HubRepository) -> HubAnswer:
        names = sorted(repository.tags)
        page, link = self._page(request, names, f"/v2/{repo}/tags/list", lambda each: each)
        return text(200, json.dumps({"name": repo, "tags": page}), "application/json", link)

    def _referrers(self, request: HubRequest, target: HubTarget, repository: HubRepository) -> HubAnswer:
        if not self.switches.referrers:
            return text(404, "404 page not found\n", "text/plain")
        wanted = request.query.get("artifactType", "")
        entries = repository.referrers(target.reference, wanted)
        path = f"/v2/{target.repo}/referrers/{target.reference}"
        page, headers = self._page(request, entries, path, lambda each: str(each["digest"]))
        if wanted:
            headers["OCI-Filters-Applied"] = "artifactType"
        document = {"schemaVersion": 2, "mediaType": INDEX, "manifests": page}
        return text(200, json.dumps(document), INDEX, headers)

    def _page(self, request: HubRequest, entries: list[Any], path: str, key: Any) -> tuple[list[Any], dict[str, str]]:
        """Returns at most `n` entries after `last`, and a Link to the next page if there is one. `n` and `last`: the
        parameters of the request. `key`: a function that returns the text by which an entry is sorted."""
        query = request.query
        wanted = int(query["n"]) if query.get("n", "").isdecimal() else self.switches.page
        size, last = min(wanted, self.switches.page), query.get("last", "")
        following = [each for each in entries if not last or key(each) > last]
        page = following[:size]
        if len(following) <= size or not page:
            return page, {}
        next_query = {**query, "n": str(size), "last": key(page[-1])}
        url = path + "?" + "&".join(f"{name}={quote(value, safe='')}" for name, value in next_query.items())
        return page, {"Link": f'<{url}>; rel="next"'}

    def _blob(
        self, request: HubRequest, repository: HubRepository, digest: str, record: RecordedRequest, cdn: str
    ) -> HubAnswer:
        record.digest = digest
        if digest not in repository.blobs:
            return error(404, "blob unknown to registry", code="BLOB_UNKNOWN")
        if record.kind == "redirect":
            key = f"{len(self.links)}"
            self.links[key] = 0
            location = f"{self.switches.cdn or cdn}/registry-v2/blobs/{digest.replace(':', '/')}/data?verify={key}"
            return text(307, f'<a href="{location}">moved</a>\n', "text/html", {"Location": location})
        return self.bytes_of(request, digest, {"Docker-Content-Digest": digest})

    def stored(self, request: HubRequest, digest: str, record: RecordedRequest) -> HubAnswer:
        """Returns the response of the second port, to which requests for blobs are redirected."""
        record.digest = digest
        if "authorization" in request.headers:
            return text(400, "<Error><Code>InvalidRequest</Code></Error>", "application/xml")
        key = request.query.get("verify", "")
        uses = self.links.get(key)
        if uses is None or digest not in self.content.bodies:
            return text(403, "<Error><Code>AccessDenied</Code></Error>", "application/xml")
        if self.switches.link_uses is not None and uses >= self.switches.link_uses:
            return text(403, "<Error><Code>AccessDenied</Code><Message>expired</Message></Error>", "application/xml")
        self.links[key] = uses + 1
        return self.bytes_of(request, digest, {})

    def bytes_of(self, request: HubRequest, digest: str, headers: Mapping[str, str]) -> HubAnswer:
        """Returns a response with a blob, or with the requested range of the blob (RFC 9110, 14)."""
        body = self.content.bodies[digest]
        etag = f'"{digest}"'
        all_headers = {"Content-Type": "application/octet-stream", **headers, "ETag": etag}
        if not self.switches.ranges:
            return self._encoded(request, part(200, all_headers, body, 0, body.size))
        all_headers["Accept-Ranges"] = "bytes"
        range_match = _RANGE.fullmatch(request.headers.get("range", ""))
        current = request.headers.get("if-range", etag) == etag
        if request.method != "GET" or not range_match or not any(range_match.groups()) or not current:
            return self._encoded(request, part(200, all_headers, body, 0, body.size))
        start, stop = _bounds(range_match[1], range_match[2], body.size)
        if start >= stop:
            return text(416, "", "text/plain", {"Content-Range": f"bytes */{body.size}"})
        return part(206, all_headers, body, start, stop)

    def _encoded(self, request: HubRequest, answer: HubAnswer) -> HubAnswer:
        """Returns the response compressed with gzip, if the switch `gzip` is set and the client accepts it."""
        accepted = [each.strip().partition(";")[0] for each in request.headers.get("accept-encoding", "").split(",")]
        if not self.switches.gzip or "gzip" not in accepted or request.method != "GET":
            return answer
        packed = gzip.compress(b"".join(answer.body.pieces(answer.start, answer.stop)), compresslevel=1, mtime=0)
        headers = {**answer.headers, "Content-Encoding": "gzip", "Content-Length": str(len(packed))}
        return HubAnswer(answer.status, headers, MappedBody(packed), 0, len(packed))


def _bounds(first: str, last: str, size: int) -> tuple[int, int]:
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(int(last) + 1, size) if last else size
