"""Counts and reports the results of an import (`ImportReport`), and decides which repositories are imported
(`RepositoryFilter`).

The *old registry* is the one whose content is imported. A *problem* is content of the old registry that could not be
imported. A *note* is information for the user about a case in which no content was lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from storage.imports import ImportInvalid
from storage.jobs import JSON
from storage.names import RepositoryName
from storage.patterns import NamePattern
from storage.upkeep.job_runner import JobContext

MAX_LISTED_PROBLEMS: Final = 1000
"""Largest number of problems that the result of a job lists. The result counts all problems. The job also reports each
problem as a step (a record for commands that watch the job)."""


@dataclass(slots=True)
class ImportReport:
    """Counts the results of an import.

    - `present`: tags that this registry already had with the same digest.
    - `linked`, `copied`, `fetched`: new blobs whose files were hard-linked, copied, or fetched over the network.
    - `shared`: blobs that another repository of this registry already had.
    - `bytes`: total size of the linked, copied and fetched blobs in bytes."""

    context: JobContext
    repositories: int = 0
    tags: int = 0
    present: int = 0
    manifests: int = 0
    linked: int = 0
    copied: int = 0
    fetched: int = 0
    shared: int = 0
    bytes: int = 0
    problems: int = 0
    notes: int = 0
    _listed: list[dict[str, str]] = field(default_factory=list)

    def record_imported(self, repository: str, tag: str, digest: str) -> None:
        """Records that a tag was imported, with all manifests and blobs below it."""
        self.tags += 1
        self.context.step("imported", repository=repository, tag=tag, digest=digest)

    def record_problem(self, repository: str, reason: str, **what: str) -> None:
        """Records content that could not be imported. `what`: the tag, digest or file that the problem is about."""
        self.problems += 1
        listed_problem = {"repository": repository, **what, "reason": reason}
        if len(self._listed) < MAX_LISTED_PROBLEMS:
            self._listed.append(listed_problem)
        self.context.step("problem", **listed_problem)

    def record_note(self, repository: str, reason: str, **what: str) -> None:
        """Records a note. `what`: the tag, digest or file that the note is about."""
        self.notes += 1
        self.context.step("note", repository=repository, **what, reason=reason)

    async def show_progress(self, repository: str, *, save_now: bool = False) -> None:
        """Reports the number of finished tags, and the repository that is imported now. If `save_now` is True, stores
        the progress at once; otherwise at most once a second. Raises JobStopped."""
        await self.context.report(self.tags + self.present, unit="tags", message=repository, save_now=save_now)

    def result(self) -> JSON:
        """Returns the result of the job."""
        names = ("repositories", "tags", "present", "manifests", "linked", "copied", "fetched", "shared", "bytes")
        counts: dict[str, Any] = {name: getattr(self, name) for name in names}
        return {**counts, "problems": self.problems, "notes": self.notes, "listed_problems": self._listed}


class RepositoryFilter:
    """Decides which repositories of the old registry are imported."""

    def __init__(self, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> None:
        """`include`: patterns of the names to import; if it is empty, all names. `exclude`: patterns of names to leave
        out, even if `include` matches them. Raises ImportInvalid if a text is not a pattern."""
        try:
            self._include = [NamePattern(text) for text in include]
            self._exclude = [NamePattern(text) for text in exclude]
        except ValueError as error:
            raise ImportInvalid(str(error)) from None
        self._unmatched = dict.fromkeys([*self._include, *self._exclude])

    def includes(self, repo: RepositoryName) -> bool:
        """Returns whether the repository is imported."""
        included = [pattern for pattern in self._include if pattern.matches(repo)]
        excluded = [pattern for pattern in self._exclude if pattern.matches(repo)]
        for pattern in (*included, *excluded):
            self._unmatched.pop(pattern, None)
        return bool(included or not self._include) and not excluded

    def unmatched_patterns(self) -> list[str]:
        """Returns the patterns that have matched no repository so far."""
        return list(self._unmatched)
