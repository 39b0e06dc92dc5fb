"""Reads the data directory of a CNCF Distribution registry (`registry:2`, `registry:3`), the *old registry*:
`DistributionDirectory`.

    ROOT = …/docker/registry/v2
    ROOT/repositories/NAME/_manifests/tags/TAG/current/link          the digest that the tag points at
    ROOT/repositories/NAME/_manifests/revisions/sha256/HEX/link      a manifest of the repository, tagged or not
    ROOT/repositories/NAME/_layers/sha256/HEX/link                   a blob of the repository
    ROOT/repositories/NAME/_uploads/UUID/                            an unfinished push
    ROOT/blobs/sha256/HH/HEX/data                                    the bytes of a manifest or blob

A *link* is a file named `link` that contains a digest. When the old registry deletes a manifest, it removes the link,
but keeps the directory HEX. The old registry serves a manifest or blob only from repositories with a link to it: a
client that knows a digest gets no access to content of other repositories.

The old registry may run while this module reads the directory: it never writes to a finished file below `blobs` again,
and its garbage collection only unlinks files. All methods do blocking I/O.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from storage.content import Manifest
from storage.errors import DigestInvalid, ManifestInvalid, NameInvalid, TagInvalid
from storage.imports import ContentBroken, ImportInvalid
from storage.names import MAX_NAME_LENGTH, Digest, RepositoryName, Tag, shown

_ROOTS: Final = ("", "docker/registry/v2", "registry/v2", "v2", "_data/docker/registry/v2", "data/docker/registry/v2")
"""Where ROOT may be, relative to the path that the user gives. The user may give the path of a docker volume, of the
old registry's `rootdirectory`, or of a directory below `rootdirectory`."""
_MAX_LINK_BYTES: Final = 256
"""Largest number of bytes that are read from a link. A link contains one digest."""
_NOT_SERVED: Final = "the old registry does not serve it from this repository: its link is missing"
MAX_IMPORTED_MANIFEST_BYTES: Final = 64 * 1024 * 1024
"""Size in bytes of the largest manifest that is read. No setting of this registry can allow a larger manifest."""


@dataclass(frozen=True, slots=True)
class TagLink:
    """A tag of the old registry. `digest`: the digest that the tag points at. `set_at`: when the tag was set, in
    seconds since 1970."""

    tag: Tag
    digest: Digest
    set_at: float


@dataclass(frozen=True, slots=True)
class BrokenEntry:
    """A repository, tag, manifest, or blob that cannot be imported, or a directory that cannot be listed. `reason`:
    what is wrong. The value of `name` is:

    - For a repository or tag: its name.
    - For a manifest or blob: the hex digits of its digest.
    - For a directory in a repository, such as `_layers`: empty. `reason` then contains the directory's name."""

    name: str
    reason: str


class DistributionDirectory:
    """The data directory of a Distribution registry. `root`: the directory ROOT, which contains `repositories` and
    `blobs`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def find(cls, path: Path) -> DistributionDirectory:
        """Finds the ROOT of a registry at one of the paths `_ROOTS` in `path`. Raises ImportInvalid if there is no
        registry, or if its directory cannot be read."""
        for subdirectory in _ROOTS:
            root = path / subdirectory
            try:
                os.scandir(root / "repositories").close()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise ImportInvalid(
                    f"{root}/repositories cannot be read: {error.strerror}; give this user the right to read it"
                ) from None
            except ValueError:
                raise ImportInvalid("the path has a character that paths cannot have, such as a null") from None
            return cls(root)
        problem = "is no registry" if path.is_dir() else "is no directory"
        raise ImportInvalid(
            f"{path} {problem}: name the directory that contains docker/registry/v2/repositories, "
            "which is storage.filesystem.rootdirectory in the old config.yml"
        )

    def repositories(self) -> Iterator[RepositoryName | BrokenEntry]:
        """Yields the repositories, sorted by name. Yields a BrokenEntry for each directory that cannot be read, and for
        each repository whose name is not valid."""
        yield from self._repositories_below("")

    def _repositories_below(self, prefix: str) -> Iterator[RepositoryName | BrokenEntry]:
        try:
            with os.scandir(self.root / "repositories" / prefix) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir())
        except OSError as error:
            yield BrokenEntry(prefix, f"its directory cannot be read: {error.strerror}")
            return
        if "_manifests" in names or "_layers" in names:
            try:
                yield RepositoryName(prefix)
            except NameInvalid as error:
                yield BrokenEntry(prefix, error.message)
        for name in names:
            path = f"{prefix}/{name}" if prefix else name
            # The length limit also ends the recursion if symbolic links form a cycle.
            if not name.startswith("_") and len(path) <= MAX_NAME_LENGTH:
                yield from self._repositories_below(path)

    def tags(self, repo: RepositoryName) -> Iterator[TagLink | BrokenEntry]:
        """Yields the tags of the repository, sorted by name. Yields a BrokenEntry for each tag that cannot be read, and
        one if the tags cannot be listed."""
        try:
            names = self._entry_names(repo, "_manifests/tags")
        except ContentBroken as error:
            yield BrokenEntry("", error.message)
            return
        for name in names:
            link = self._manifests_path(repo) / "tags" / name / "current" / "link"
            try:
                yield TagLink(Tag(name), *_read_link(link))
            except (TagInvalid, ContentBroken) as error:
                yield BrokenEntry(name, error.message)

    def manifest_digests(self, repo: RepositoryName) -> Iterator[Digest | BrokenEntry]:
        """Yields the digest of each manifest of the repository. Leaves out deleted manifests. Yields a BrokenEntry for
        each link or directory that cannot be read."""
        for path in self._link_directories(repo, "_manifests/revisions"):
            if isinstance(path, BrokenEntry):
                yield path
                continue
            try:
                digest = Digest(f"{path.parent.name}:{path.name}")
                os.stat(path / "link")
            except FileNotFoundError:
                continue
            except OSError as error:
                yield BrokenEntry(path.name, f"its link cannot be read: {error.strerror}")
            except DigestInvalid as error:
                yield BrokenEntry(path.name, error.message)
            else:
                yield digest

    def manifest_time(self, repo: RepositoryName, digest: Digest) -> float | None:
        """Returns when the manifest was pushed to the repository, in seconds since 1970; None if the repository has no
        link to the manifest, for example after a deletion. Raises ContentBroken if the time cannot be read."""
        link = self._manifests_path(repo) / "revisions" / digest.algorithm / digest.encoded / "link"
        return _link_time(link, f"the link of {digest}")

    def blob_digests(self, repo: RepositoryName) -> Iterator[Digest | BrokenEntry]:
        """Yields the digest of each blob of the repository. Leaves out directories whose names are no digest. Yields a
        BrokenEntry for each link or directory that cannot be read."""
        for path in self._link_directories(repo, "_layers"):
            if isinstance(path, BrokenEntry):
                yield path
                continue
            try:
                digest = Digest(f"{path.parent.name}:{path.name}")
                if _link_time(path / "link", f"the link of the blob {digest}") is not None:
                    yield digest
            except DigestInvalid:
                continue
            except ContentBroken as error:
                yield BrokenEntry(path.name, error.message)

    def blob_size(self, repo: RepositoryName, digest: Digest) -> int:
        """Returns the size in bytes of a blob that the old registry serves from this repository. Raises
        ContentBroken."""
        self._check_blob_link(repo, digest)
        try:
            return os.stat(self.blob_path(digest)).st_size
        except OSError as error:
            raise ContentBroken(_read_error_text(f"the file of the blob {digest}", error)) from None

    def count_unfinished_uploads(self, repo: RepositoryName) -> int:
        """Returns the number of unfinished pushes of the repository. Raises ContentBroken."""
        return len(self._entry_names(repo, "_uploads"))

    def manifest(self, repo: RepositoryName, digest: Digest) -> Manifest:
        """Returns a manifest that the old registry serves from this repository. Raises ContentBroken."""
        if self.manifest_time(repo, digest) is None:
            raise ContentBroken(_NOT_SERVED)
        path = self.blob_path(digest)
        try:
            with open(path, "rb") as file:
                body = file.read(MAX_IMPORTED_MANIFEST_BYTES + 1)
        except OSError as error:
            raise ContentBroken(_read_error_text("its file", error)) from None
        if len(body) > MAX_IMPORTED_MANIFEST_BYTES:
            raise ContentBroken(f"its file has more than {MAX_IMPORTED_MANIFEST_BYTES} bytes, so it is no manifest")
        try:
            return Manifest.parse(body, None, digest)
        except DigestInvalid:
            raise ContentBroken("the bytes of its file have another digest") from None
        except ManifestInvalid as error:
            raise ContentBroken(error.message) from None

    def blob_path(self, digest: Digest) -> Path:
        """Returns the path of the file with the bytes of the blob or manifest."""
        return self.root / "blobs" / digest.algorithm / digest.encoded[:2] / digest.encoded / "data"

    def open_blob(self, repo: RepositoryName, digest: Digest) -> int:
        """Opens the file of a blob that the old registry serves from this repository. Returns the descriptor of the
        open file. Raises ContentBroken."""
        self._check_blob_link(repo, digest)
        try:
            return os.open(self.blob_path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ContentBroken(_read_error_text(f"the file of the blob {digest}", error)) from None

    def _check_blob_link(self, repo: RepositoryName, digest: Digest) -> None:
        """Raises ContentBroken if the repository has no link to the blob, or if the link cannot be read."""
        link = self._repository_path(repo) / "_layers" / digest.algorithm / digest.encoded / "link"
        if _link_time(link, f"the link of the blob {digest}") is None:
            raise ContentBroken(f"the blob {digest}: {_NOT_SERVED}")

    def _repository_path(self, repo: RepositoryName) -> Path:
        return self.root / "repositories" / repo

    def _manifests_path(self, repo: RepositoryName) -> Path:
        return self._repository_path(repo) / "_manifests"

    def _entry_names(self, repo: RepositoryName, directory: str) -> list[str]:
        """Returns the sorted names of the entries of a directory in the repository; an empty list if the directory does
        not exist. Raises ContentBroken if the directory cannot be read."""
        try:
            return sorted(os.listdir(self._repository_path(repo) / directory))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise ContentBroken(f"its directory {directory} cannot be read: {error.strerror}") from None

    def _link_directories(self, repo: RepositoryName, directory: str) -> Iterator[Path | BrokenEntry]:
        """Yields the directories ALGORITHM/HEX below the directory `directory` of the repository. Each of them may
        contain a link. Yields a BrokenEntry for each directory that cannot be listed."""
        try:
            algorithms = self._entry_names(repo, directory)
        except ContentBroken as error:
            yield BrokenEntry("", error.message)
            return
        for algorithm in algorithms:
            try:
                names = self._entry_names(repo, f"{directory}/{algorithm}")
            except ContentBroken as error:
                yield BrokenEntry("", error.message)
                continue
            for encoded in names:
                yield self._repository_path(repo) / directory / algorithm / encoded


def _read_error_text(what: str, error: OSError) -> str:
    """Returns the reason why a file cannot be read. `what`: the file, for messages."""
    if isinstance(error, FileNotFoundError):
        return f"{what} is missing"
    return f"{what} cannot be read: {error.strerror}"


def _link_time(path: Path, what: str) -> float | None:
    """Returns when a link was written, in seconds since 1970; None if there is no link. `what`: the link, for
    messages. Raises ContentBroken if the time of the link cannot be read."""
    try:
        return os.stat(path).st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ContentBroken(_read_error_text(what, error)) from None


def _read_link(path: Path) -> tuple[Digest, float]:
    """Returns the digest in a link, and when the link was written, in seconds since 1970. Raises ContentBroken."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_LINK_BYTES).decode("ascii", errors="replace").strip()
            return Digest(text), os.fstat(file.fileno()).st_mtime
    except OSError as error:
        raise ContentBroken(_read_error_text("its link", error)) from None
    except DigestInvalid:
        raise ContentBroken(f"its link contains {shown(text)}, which is not a digest") from None
