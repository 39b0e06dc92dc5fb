"""The rights of an account on a repository, as the management API and `entrepot grant explain` show them. The
docstrings of the models appear in the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, Field

from registry.admin import models
from registry.auth.rights.explanation import RepositoryRights, RightsExplanation


class RepositoryRightsResponse(BaseModel):
    """What the account may do on one repository. `name`: the repository's name in the store. `upstream`: the upstream
    from which the repository is mirrored; null if the repository is hosted. `grants`: the first 100 of the grants
    that apply to the account on the repository."""

    name: str
    upstream: str | None
    actions: list[models.ActionWord]
    grants: list[models.GrantResponse]

    @classmethod
    def from_rights(cls, rights: RepositoryRights) -> Self:
        return cls(
            name=rights.name,
            upstream=rights.upstream,
            actions=models.action_words(rights.actions),
            grants=[models.GrantResponse.from_stored(grant) for grant in rights.grants],
        )


class RightsResponse(BaseModel):
    """What an account may do on a repository.

    - `account`: the account's name; null for a client without a login.
    - `stored`: whether the store has the account; false for a client without a login. If the store lacks the account,
      its rights are those of an account of this name in the htpasswd file.
    - `enabled`: false for a disabled account, which may do nothing.
    - `admin`, `open`: if one of them is true, grants have no effect.
    - `repositories`: the repositories that the name in the request can mean. A name without a host, such as `team/app`,
      can mean a hosted repository and a repository of the default upstream."""

    account: str | None
    stored: bool
    enabled: bool
    admin: Annotated[bool, Field(description="May do everything")]
    open: Annotated[bool, Field(description="There are no accounts yet")]
    repositories: list[RepositoryRightsResponse]

    @classmethod
    def from_explanation(cls, explanation: RightsExplanation) -> Self:
        return cls(
            account=explanation.account,
            stored=explanation.is_stored,
            enabled=explanation.is_enabled,
            admin=explanation.is_admin,
            open=explanation.is_registry_open,
            repositories=[RepositoryRightsResponse.from_rights(rights) for rights in explanation.repositories],
        )
