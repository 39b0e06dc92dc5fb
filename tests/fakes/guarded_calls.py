"""For tests of access rights: a call of each method of `Registry`, principals with certain rights, and a function that
returns the outcome of a call as a client would learn it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from registry.auth.rights.principal import Identity, Principal, Rights
from storage.access import Action
from storage.content import Span
from storage.errors import RegistryError
from storage.interface import Registry
from storage.names import RepositoryName, Tag, UploadID
from storage.patterns import ALL_NAMES, NameSet
from tests.fakes.registry_content import BY, descriptor_of, image_of
from tests.fakes.store_accounts import limit

APP, NONE = RepositoryName("team/app"), RepositoryName("team/non")
OTHER = RepositoryName("other/app")
LATEST = Tag("latest")
LAYER = descriptor_of(b"layer of one").digest
IMAGE = image_of(descriptor_of(b"{}", "application/x.test"))
UPLOAD = UploadID.random()

PULL, PUSH, DELETE = Action.PULL, Action.PUSH, Action.DELETE

Call = Callable[[Registry, RepositoryName], Awaitable[object]]

READS: Mapping[str, Call] = {
    "resolve_blob": lambda r, repo: r.resolve_blob(repo, LAYER),
    "open_blob": lambda r, repo: r.open_blob(repo, LAYER, Span(0, 2)),
    "resolve_manifest": lambda r, repo: r.resolve_manifest(repo, LATEST),
    "get_manifest": lambda r, repo: r.get_manifest(repo, LATEST),
    "tags": lambda r, repo: r.tags(repo, None, 10),
}
WRITES: Mapping[str, Call] = {
    "start_upload": lambda r, repo: r.start_upload(repo, by=BY),
    "resume_upload": lambda r, repo: r.resume_upload(repo, UPLOAD, by=BY),
    "upload_offset": lambda r, repo: r.upload_offset(repo, UPLOAD, by=BY),
    "mount_blob": lambda r, repo: r.mount_blob(repo, LAYER, OTHER, BY),
    "mount_blob, from anywhere": lambda r, repo: r.mount_blob(repo, LAYER, ALL_NAMES, BY),
    "put_manifest": lambda r, repo: r.put_manifest(repo, IMAGE, [LATEST], by=BY),
}
DELETES: Mapping[str, Call] = {
    "delete_blob": lambda r, repo: r.delete_blob(repo, LAYER, by=BY),
    "delete_manifest": lambda r, repo: r.delete_manifest(repo, LAYER, by=BY),
    "delete_tag": lambda r, repo: r.delete_tag(repo, LATEST, by=BY),
}
OTHERS: Mapping[str, Call] = {
    "referrers": lambda r, repo: r.referrers(repo, LAYER, None, None, 10),
    "repositories": lambda r, repo: r.repositories(None, 10),
}
CALLS = {**READS, **WRITES, **DELETES, **OTHERS}


def principal_with(
    name: str | None, *access: tuple[str, Action], token: Mapping[str, Action] | None = None, limits: str | None = None
) -> Principal:
    """Returns a principal with the rights `access`, pairs of a pattern and an action. `token`: the rights in its bearer
    token. `limits`: a pattern to which its API token is limited."""
    actions: dict[Action, list[str]] = {}
    for pattern, allowed in access:
        for action in Action:
            if action in allowed:
                actions.setdefault(action, []).append(pattern)
    proof = Identity(name, access=token, limits=(limit(limits, "*"),) if limits else None)
    return Principal(proof, Rights({action: NameSet.of(found) for action, found in actions.items()}))


ALICE = principal_with("alice", ("own/**", PULL | PUSH | DELETE))
ANYBODY = principal_with(None, ("own/**", PULL))
ROOT = Principal(Identity("root"), Rights.everything(admin=True))


async def outcome(call: Awaitable[object]) -> tuple[object, ...]:
    """Returns all that a client learns from a call: the result, or the class and the fields of the error."""
    try:
        return ("OK", repr(await call))
    except RegistryError as error:
        return (type(error), error.code, error.message, repr(error.detail))
