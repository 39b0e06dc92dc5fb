"""Traces for OpenTelemetry (`Tracing`): spans for the HTTP requests of clients, for the operations of the registry that
they cause, for the requests to upstreams, and for changes of the metadata. An *operation* is a call of a method of
`storage.interface.Registry`, such as `get_manifest`.

The libraries come with the extra `entrepot[otel]`, and are imported only if traces are configured.
"""

from __future__ import annotations

import os
from asyncio import Future
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

from registry import __version__
from registry.asgi import REQUEST_NOTES_EXTENSION, Scope, client_address

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

TRACES_PATH: Final = "/v1/traces"
"""Path at which a collector accepts traces (OTLP 1, "OTLP/HTTP Request")."""
_SPAN: Final = "span"
"""Key of a request's span in the *notes*: a dictionary in the request's scope, in which the application stores facts
until the server reports the end of the request."""


class Tracing:
    """Makes spans in one process and sends them to the collector, in a thread. Create it after the fork. If the
    collector does not answer, spans are lost, but no request is delayed. The methods raise nothing."""

    def __init__(self, endpoint: str | None) -> None:
        """`endpoint`: the setting `otel.endpoint`; None: the variables of OpenTelemetry name the collector."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        url = None if endpoint is None else endpoint.rstrip("/") + TRACES_PATH
        service_name = os.environ.get("OTEL_SERVICE_NAME", "entrepot")
        resource = Resource.create({"service.name": service_name, "service.version": __version__})
        self._provider: TracerProvider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url, timeout=5)))
        self._tracer = self._provider.get_tracer("entrepot", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def request(self, scope: Scope) -> AbstractContextManager[object]:
        """Starts the span of a request. The span is the current one inside the `with` block. Its parent is the span
        that the header traceparent names. `end_request` ends the span. If the server has put no dictionary for notes
        into `scope`, `end_request` cannot find the span, so the span ends with the block."""
        from opentelemetry.trace import use_span

        notes = (scope.get("extensions") or {}).get(REQUEST_NOTES_EXTENSION)
        span = self._start(scope)
        if notes is not None:
            notes[_SPAN] = span
        return use_span(span, end_on_exit=notes is None)

    def end_request(self, scope: Scope, route: str, status: int) -> None:
        """Ends the span of a request. `route`: the kind of the requested resource, such as `manifests`. `status`: 0 if
        no response was begun."""
        span = (scope.get("extensions") or {}).get(REQUEST_NOTES_EXTENSION, {}).get(_SPAN)
        if span is not None:
            self._end(span, scope, route, status)

    def cached_request(self, scope: Scope, route: str) -> None:
        """Makes the span of a request that the response cache has answered."""
        span = self._start(scope)
        span.set_attribute("entrepot.cached_answer", True)
        self._end(span, scope, route, 200)

    def call(self, operation: str, repo: str) -> AbstractContextManager[object]:
        """Makes a span for one operation of the registry, which the caller runs inside the `with` block. `repo`: empty
        if the operation concerns no single repository."""
        attributes = {"entrepot.repository": repo} if repo else {}
        return self._tracer.start_as_current_span(f"registry.{operation}", attributes=attributes)

    def upstream_request(self, upstream: str, endpoint: str, repo: str) -> AbstractContextManager[object]:
        """Makes one span for all requests that the caller sends to an endpoint of an upstream inside the `with` block.
        `endpoint`: the URL of the endpoint, without secrets. `repo`: the repository's name at the upstream."""
        from opentelemetry.trace import SpanKind

        attributes = {"entrepot.upstream": upstream, "entrepot.endpoint": endpoint, "entrepot.repository": repo}
        return self._tracer.start_as_current_span("upstream.request", kind=SpanKind.CLIENT, attributes=attributes)

    def change(self, change: Future[Any]) -> None:
        """Makes the span of a change of the metadata. It begins now and ends when `change` is done."""
        span = self._tracer.start_span("database.write", attributes={"db.system.name": "sqlite"})
        change.add_done_callback(lambda _: span.end())

    def close(self) -> None:
        """Sends the spans that have ended. Takes some seconds if the collector does not answer, so call it in a
        thread."""
        self._provider.shutdown()

    def _start(self, scope: Scope) -> Any:
        from opentelemetry.trace import SpanKind

        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {
            "http.request.method": scope["method"],
            "url.path": scope["path"],
            "client.address": client_address(scope),
        }
        parent = self._propagator.extract(carrier)
        return self._tracer.start_span(scope["method"], parent, SpanKind.SERVER, attributes)

    def _end(self, span: Any, scope: Scope, route: str, status: int) -> None:
        from opentelemetry.trace import Status, StatusCode

        span.update_name(f"{scope['method']} {route}")
        span.set_attribute("http.route", route)
        if status:
            span.set_attribute("http.response.status_code", status)
        if status >= 500 or not status:
            span.set_status(Status(StatusCode.ERROR))
        span.end()
