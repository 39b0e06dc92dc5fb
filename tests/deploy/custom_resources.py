"""JSON schemas of the custom resources in the Helm chart, limited to the fields that the chart can use.
`kubernetes-validate` has only the schemas of Kubernetes' own resources.

Sources: the API references of the Prometheus Operator (monitoring.coreos.com/v1) and of the Gateway API
(gateway.networking.k8s.io/v1).
"""

from __future__ import annotations

from typing import Any, Final

_TEXT: Final = {"type": "string"}
_TEXTS_BY_NAME: Final = {"type": "object", "additionalProperties": _TEXT}
_DURATION: Final = {
    "type": "string",
    "pattern": r"^(0|(([0-9]+)y)?(([0-9]+)w)?(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?)$",
}
_GATEWAY_DURATION: Final = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
_HOST: Final = {
    "type": "string",
    "pattern": r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
}
_PORT: Final = {"type": "integer", "minimum": 1, "maximum": 65535}


def _object(required: str = "", /, **properties: Any) -> dict[str, Any]:
    """Returns the schema of an object. `required`: the names of the required properties, separated by spaces."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


def _resource(version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = _object("name", name=_TEXT, namespace=_TEXT, labels=_TEXTS_BY_NAME, annotations=_TEXTS_BY_NAME)
    return _object(
        "apiVersion kind metadata spec",
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


_RELABELING: Final = _object(
    sourceLabels=_list(_TEXT), targetLabel=_TEXT, regex=_TEXT, replacement=_TEXT, action=_TEXT, separator=_TEXT
)
_SERVICE_MONITOR: Final = _object(
    "endpoints selector",
    jobLabel=_TEXT,
    namespaceSelector=_object(matchNames=_list(_TEXT)),
    selector=_object("matchLabels", matchLabels=_TEXTS_BY_NAME),
    endpoints=_list(
        _object(
            port=_TEXT,
            path=_TEXT,
            interval=_DURATION,
            scrapeTimeout=_DURATION,
            scheme={"enum": ["http", "https"]},
            tlsConfig=_object(insecureSkipVerify={"type": "boolean"}),
            relabelings=_list(_RELABELING),
            metricRelabelings=_list(_RELABELING),
        )
    ),
)
_RULE: Final = _object(
    "alert expr", alert=_TEXT, expr=_TEXT, labels=_TEXTS_BY_NAME, annotations=_TEXTS_BY_NAME, **{"for": _DURATION}
)
_PROMETHEUS_RULE: Final = _object("groups", groups=_list(_object("name rules", name=_TEXT, rules=_list(_RULE))))
_HTTP_ROUTE: Final = _object(
    "parentRefs rules",
    parentRefs=_list(_object("name", name=_TEXT, namespace=_TEXT, sectionName=_TEXT, port=_PORT)),
    hostnames=_list(_HOST),
    rules=_list(
        _object(
            matches=_list(_object("path", path=_object(type={"enum": ["PathPrefix", "Exact"]}, value=_TEXT))),
            timeouts=_object(request=_GATEWAY_DURATION, backendRequest=_GATEWAY_DURATION),
            backendRefs=_list(_object("name port", name=_TEXT, port=_PORT)),
        )
    ),
)
CUSTOM_RESOURCES: Final = {
    "ServiceMonitor": _resource("monitoring.coreos.com/v1", "ServiceMonitor", _SERVICE_MONITOR),
    "PrometheusRule": _resource("monitoring.coreos.com/v1", "PrometheusRule", _PROMETHEUS_RULE),
    "HTTPRoute": _resource("gateway.networking.k8s.io/v1", "HTTPRoute", _HTTP_ROUTE),
}
"""The schema of each kind of custom resource."""
