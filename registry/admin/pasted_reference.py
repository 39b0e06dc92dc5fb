"""Finds image references in text that people paste into a search: `docker pull host/team/app:v1`,
`host/team/app@sha256:…`, `https://host/team/app`, or just `team/app`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from storage.errors import RegistryError
from storage.names import Digest, Reference, RepositoryName, Tag

_FIRST_WORDS: Final = frozenset(
    {
        *("docker", "podman", "nerdctl", "ctr", "crictl", "k3s", "buildah", "skopeo", "crane", "oras", "regctl"),
        *("helm", "cosign", "entrepot", "sudo", "FROM", "from", "image:"),
    }
)
"""First words of pasted lines that name an image: programs, such as `docker`, and keywords of files, such as `FROM`."""
_SUBCOMMANDS: Final = frozenset(
    {
        *("pull", "run", "push", "create", "copy", "inspect", "image", "images", "tag", "save", "manifest", "content"),
        *("build", "fetch", "get", "install", "verify", "ls", "list", "show", "container"),
    }
)
"""Subcommands of these programs, such as `pull`. In a pasted command, these words do not name an image."""
_HOST: Final = re.compile(
    r"localhost(:[0-9]+)?|[a-z0-9-]+(\.[a-z0-9-]+)+(:[0-9]+)?|[a-z0-9-]+:[0-9]+|\[[0-9a-f:]+\](:[0-9]+)?"
)
"""Matches a host name or IP address, with or without a port. A name without a dot needs a port, except `localhost`."""
_SCHEMES: Final = ("docker://", "oci://", "https://", "http://")
"""The schemes with which a pasted reference can begin."""
_MAX_WORDS: Final = 16
"""How many words of the text are searched for a reference."""


@dataclass(frozen=True, slots=True)
class PastedReference:
    """An image reference in a pasted text. `reference`: the digest, or else the tag; None if the text has neither."""

    repository: RepositoryName
    reference: Reference | None


def pasted_references(text: str) -> Iterator[PastedReference]:
    """Yields the image references that `text` can mean, in the order of the text. For a name that begins with a host,
    yields first the whole name, then the name without the host."""
    words = text.split()[:_MAX_WORDS]
    is_command = bool(words) and words[0] in _FIRST_WORDS
    for word in words:
        word = word.strip("\"'`,;")
        if is_command and (word in _FIRST_WORDS or word in _SUBCOMMANDS):
            continue
        # Skips options. Outside a command, also skips words that look like plain text, unless there is only one word.
        if word.startswith("-") or not (is_command or len(words) == 1 or any(character in word for character in "/:@")):
            continue
        for scheme in _SCHEMES:
            word = word.removeprefix(scheme)
        yield from _parse_word(word.rstrip("/"))


def _parse_word(word: str) -> Iterator[PastedReference]:
    """Yields the references that one word can mean. Yields nothing if the word is not a valid reference."""
    before_digest, at, digest = word.partition("@")
    name, colon, tag = before_digest.rpartition(":")
    if not colon or "/" in tag:
        name, tag = before_digest, ""
    try:
        reference: Reference | None = Tag(tag) if tag else None
        if at:
            reference = Digest(digest)
    except RegistryError:
        return
    host, slash, name_on_host = name.partition("/")
    for repository_name in (name, name_on_host) if slash and _HOST.fullmatch(host) else (name,):
        try:
            yield PastedReference(RepositoryName(repository_name), reference)
        except RegistryError:
            continue
