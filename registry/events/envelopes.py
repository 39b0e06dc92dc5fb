"""Writes the body of a webhook request for an event, in one of two forms: CloudEvents 1.0, or the notifications of CNCF
Distribution.

Sources: CloudEvents 1.0.2, "JSON Event Format"; CNCF Distribution, notifications/event.go.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import quote, urlsplit

from storage.content import BLOB_TYPE
from storage.outbox import Event, EventAction

CLOUDEVENTS_MEDIA_TYPE: Final = "application/cloudevents+json; charset=utf-8"
DISTRIBUTION_MEDIA_TYPE: Final = "application/vnd.docker.distribution.events.v2+json"
_CLOUDEVENT_TYPE_BY_ACTION: Final[Mapping[EventAction, str]] = {
    EventAction.PUSH: "entrepot.image.pushed",
    EventAction.DELETE: "entrepot.image.deleted",
    EventAction.MOVE: "entrepot.tag.moved",
    EventAction.RETENTION: "entrepot.image.expired",
    EventAction.EVICTION: "entrepot.image.evicted",
    EventAction.QUARANTINE: "entrepot.content.quarantined",
    EventAction.PULL: "entrepot.image.pulled",
    EventAction.FILL: "entrepot.content.filled",
    EventAction.BLOB_PUSH: "entrepot.blob.pushed",
    EventAction.BLOB_MOUNT: "entrepot.blob.mounted",
    EventAction.BLOB_DELETE: "entrepot.blob.deleted",
}
"""The attribute `type` of a CloudEvent. `EventAction` describes the actions. For example, `FILL` means that a mirror
fetched a manifest or blob from its upstream."""
_DISTRIBUTION_ACTION_AND_METHOD: Final[Mapping[EventAction, tuple[str, str]]] = {
    EventAction.PUSH: ("push", "PUT"),
    EventAction.DELETE: ("delete", "DELETE"),
    EventAction.MOVE: ("push", "PUT"),
    EventAction.RETENTION: ("delete", "DELETE"),
    EventAction.EVICTION: ("delete", "DELETE"),
    EventAction.QUARANTINE: ("quarantine", ""),
    EventAction.PULL: ("pull", "GET"),
    EventAction.FILL: ("fill", ""),
    EventAction.BLOB_PUSH: ("push", "PUT"),
    EventAction.BLOB_MOUNT: ("mount", "POST"),
    EventAction.BLOB_DELETE: ("delete", "DELETE"),
}
"""The fields `action` and `request.method` in the form of CNCF Distribution. In that form, a move of a tag is a push,
because clients move tags by pushes. The mount events of this registry leave out the repository from which the blob
was mounted, because the receiver may have no right to know it."""

EventFormatter = Callable[[Event, str], tuple[str, bytes]]
"""A function that returns the media type and the body of a webhook request for an event. Its second argument is
this registry's URL."""


def event_fields(event: Event) -> dict[str, Any]:
    """Returns an event as a JSON object, with the field names that webhooks get. Leaves out unknown values."""
    content = event.content
    fields = {
        "number": event.number,
        "id": event.id,
        "time": rfc3339(content.at),
        "action": str(content.action),
        "repository": content.repository,
        "tag": content.tag,
        "digest": content.digest,
        "previous": content.previous,
        "media_type": content.media_type,
        "size": content.size,
        "actor": content.by.name,
        "address": content.by.address,
        "request_id": content.by.request_id,
        "user_agent": content.by.user_agent,
        "reason": content.reason,
    }
    return {name: value for name, value in fields.items() if value not in (None, "", 0)}


def cloud_event(event: Event, registry_url: str) -> tuple[str, bytes]:
    """Returns the media type and the body of an event as a CloudEvent in JSON. `registry_url`: this registry's URL."""
    content = event.content
    subject = content.repository
    if content.tag is not None:
        subject += f":{content.tag}"
    elif content.digest is not None:
        subject += f"@{content.digest}"
    data = {name: value for name, value in event_fields(event).items() if name not in ("number", "id", "time")}
    document = {
        "specversion": "1.0",
        "id": event.id,
        "source": registry_url,
        "type": _CLOUDEVENT_TYPE_BY_ACTION[content.action],
        "subject": subject,
        "time": rfc3339(content.at),
        "sequence": f"{event.number:020}",  # the extension "sequence": these texts sort in the order of the events
        "datacontenttype": "application/json",
        "data": data,
    }
    return CLOUDEVENTS_MEDIA_TYPE, json.dumps(document, ensure_ascii=False).encode()


def distribution_envelope(event: Event, registry_url: str) -> tuple[str, bytes]:
    """Returns the media type and the body of an event in the form of CNCF Distribution. The list `events` in the body
    has only this event. `registry_url`: this registry's URL."""
    content = event.content
    action, method = _DISTRIBUTION_ACTION_AND_METHOD[content.action]
    host = urlsplit(registry_url).netloc
    target: dict[str, Any] = {"repository": content.repository}
    if content.tag is not None:
        target["tag"] = content.tag
    # In this form, a deleted tag has no digest, because a digest would mean that the manifest was deleted.
    if content.digest is not None and not (action == "delete" and content.tag is not None):
        kind = "blobs" if content.media_type == BLOB_TYPE else "manifests"
        target["digest"] = content.digest
        target["url"] = f"{registry_url}/v2/{quote(content.repository)}/{kind}/{content.digest}"
        if content.media_type:
            target["mediaType"] = content.media_type
        if content.size:
            target["size"] = target["length"] = content.size
    record: dict[str, Any] = {
        "id": event.id,
        "timestamp": rfc3339(content.at),
        "action": action,
        "target": target,
        "request": {
            "id": content.by.request_id,
            "addr": content.by.address,
            "host": host,
            "method": method,
            "useragent": content.by.user_agent,
        },
        "actor": {"name": content.by.name},
        "source": {"addr": host},
    }
    return DISTRIBUTION_MEDIA_TYPE, json.dumps({"events": [record]}, ensure_ascii=False).encode()


EVENT_FORMATTERS: Final[Mapping[str, EventFormatter]] = {
    "cloudevents": cloud_event,
    "distribution": distribution_envelope,
}
"""The function for each value of the setting `format`."""


def rfc3339(unix_seconds: float) -> str:
    """Returns a time in UTC with milliseconds, such as `2026-01-31T09:30:00.125Z`."""
    milliseconds = round(unix_seconds * 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000)) + f".{milliseconds % 1000:03}Z"
