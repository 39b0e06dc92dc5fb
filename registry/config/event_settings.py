"""The settings for events: `[events]` and `[[webhook]]` (HTTP endpoints that receive events).

The functions `_check_…` are pydantic validators: they return the value to use, and raise ValueError.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_settings import NoDecode

from registry.config.field_types import Duration, SettingsGroup, split_commas, split_http_url
from storage.outbox import CHANGE_ACTIONS, EventAction
from storage.patterns import NamePattern

_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
_HEADER = re.compile(r"[A-Za-z0-9-]+")
MAX_NAME_LENGTH = 64
"""Longest name of a webhook, in characters."""


def _check_name(value: str) -> str:
    if len(value) > MAX_NAME_LENGTH or not _NAME.fullmatch(value):
        raise ValueError(f"{value!r} is not a name like ci or chat-room (at most {MAX_NAME_LENGTH} characters)")
    return value


def _check_url(value: str) -> str:
    # A query may contain @. The message does not repeat the URL, which may contain a password.
    if "@" in value.partition("?")[0]:
        raise ValueError("the address must not contain a user name or password; set secret_file or token_file")
    split_http_url(value, "https://ci.example.com/hook", allow_fragment=False)
    return value


def _check_header(value: str) -> str:
    if not _HEADER.fullmatch(value):
        raise ValueError(f"{value!r} is not the name of a header")
    return value


class EventSettings(SettingsGroup):
    """Events: what happened to the content. `entrepot events` and `/api/v1/events` show them; webhooks receive them."""

    keep: Duration = Field(
        default=0.0,
        description="How long events are kept for `entrepot events` and `/api/v1/events`. 0 keeps an event only "
        "until it has been sent to the webhooks that want it",
    )
    keep_max: int = Field(default=100_000, ge=100, le=10_000_000, description="Largest number of events that are kept")
    actions: Annotated[list[EventAction], NoDecode, BeforeValidator(split_commas)] = Field(
        default=sorted(CHANGE_ACTIONS),
        description="The events that are kept; `actions` of `[[webhook]]` explains them. The events `pull`, `fill` and "
        "`blob_*` are many, so they are kept only if they are listed here",
    )
    max_pending: int = Field(
        default=100_000,
        ge=100,
        le=10_000_000,
        description="Largest number of events that wait for one webhook. If there are more, the oldest are dropped, "
        "with an error in the log: a push is never refused because a webhook is down",
    )
    max_dead: int = Field(
        default=10_000,
        ge=0,
        le=1_000_000,
        description="Largest number of dead letters of one webhook. A dead letter is an event that the server no "
        "longer tries to send. If there are more, the oldest are dropped",
    )


class Webhook(SettingsGroup):
    """An HTTP endpoint that receives events by POST. An event is sent again until the endpoint answers with a status
    2xx, or until `max_attempts` or `max_age` is reached. The events of a repository are sent in their order. An
    endpoint may get an event twice, with the same id."""

    name: Annotated[str, AfterValidator(_check_name)] = Field(description="A name for commands and logs, such as `ci`")
    url: Annotated[str, AfterValidator(_check_url)] = Field(description="The address, http or https")
    format: Literal["cloudevents", "distribution"] = Field(
        default="cloudevents",
        description="The form of the body: `cloudevents` (CloudEvents 1.0, structured JSON) or `distribution` (the "
        "notifications of CNCF Distribution)",
    )
    actions: Annotated[list[EventAction], BeforeValidator(split_commas)] = Field(
        default=sorted(CHANGE_ACTIONS),
        min_length=1,
        description="Which events: `push`, `delete`, `move` (a tag moves to another image), `retention`, `eviction`, "
        "`quarantine`, `pull`, `fill` (a mirror fetches content), `blob_push`, `blob_mount`, `blob_delete`",
    )
    repositories: Annotated[
        list[Annotated[str, AfterValidator(lambda value: NamePattern(value))]], BeforeValidator(split_commas)
    ] = Field(
        default=["**"],
        min_length=1,
        description="Patterns of repositories, such as `team/**`. The name of a mirrored repository begins with the "
        "name of its upstream",
    )
    secret_file: Path | None = Field(
        default=None, description="File that contains only the key with which each body is signed (HMAC-SHA256)"
    )
    secret_env: str | None = Field(
        default=None, description="Environment variable with the key, in place of `secret_file`"
    )
    signature_header: Annotated[str, AfterValidator(_check_header)] = Field(
        default="X-Hub-Signature-256", description="The header with the signature, `sha256=` and 64 hex digits"
    )
    token_file: Path | None = Field(
        default=None, description="File that contains only a token, which is sent as `Authorization: Bearer`"
    )
    ca_file: Path | None = Field(
        default=None,
        description="File with the authorities that sign the endpoint's certificate, in PEM. Default: "
        "those of the system",
    )
    private_network: bool = Field(
        default=False,
        description="Allow addresses that are not public: those of private networks and of this machine",
    )
    timeout: Duration = Field(default=10.0, gt=0, le=300, description="How long the endpoint may take to answer")
    connections: int = Field(
        default=4,
        ge=1,
        le=32,
        description="Maximum number of connections to the endpoint at a time. Each sends the events of one repository, "
        "one after another",
    )
    max_attempts: int = Field(
        default=10,
        ge=1,
        le=1000,
        description="How often an event is sent to an endpoint that refuses it, before the event becomes a dead "
        "letter. Attempts at which the endpoint is down (no connection, no answer, 429, 502, 503, 504) do not count",
    )
    max_age: Duration = Field(
        default=259200.0, gt=0, description="An event that could not be delivered for so long becomes a dead letter"
    )

    @model_validator(mode="after")
    def _check_secret(self) -> Self:
        if self.secret_file is not None and self.secret_env is not None:
            raise ValueError("secret_file and secret_env are both set; keep one of them")
        return self


def check_webhooks(webhooks: Sequence[Webhook]) -> None:
    """Raises ValueError if two webhooks have the same name."""
    names = [webhook.name for webhook in webhooks]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"there are two webhooks named {duplicate}")
