"""Traces for OpenTelemetry (`Tracing`). There are spans for the HTTP requests of clients, for operations of the
registry, for requests to upstreams, and for changes of the metadata. An *operation* is a call of a method of
`storage.interface.Registry`, such as `get_manifest`.

The libraries of OpenTelemetry come with the extra `entrepot[otel]`, and are imported only if traces are configured.
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
"""Path at which a collector receives traces. It is appended to the collector's URL (OTLP 1, "OTLP/HTTP Request")."""
_SPAN: Final = "span"
"""Key of a request's span in the request's notes. The *notes* are a dictionary in the ASGI scope. The application keeps
values there until the server reports the end of the request."""


class Tracing:
    """Makes the spans of one process, and sends them to the collector in a thread. Each process must create its own
    object after the fork. If the collector does not answer, spans are lost, but no request is delayed. The methods
    raise nothing."""

    def __init__(self, endpoint: str | None) -> None:
        """`endpoint`: the URL of the collector (setting `otel.endpoint`); None: OpenTelemetry's environment variables
        name the collector."""
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

    def start_request(self, scope: Scope) -> AbstractContextManager[object]:
        """Starts the span of a request. Inside the `with` block, this span is the current one. Its parent is the span
        that the request's `traceparent` header names. If `scope` has notes, `end_request` ends the span. Otherwise the
        span ends with the block."""
        from opentelemetry.trace import use_span

        notes = (scope.get("extensions") or {}).get(REQUEST_NOTES_EXTENSION)
        span = self._start_span(scope)
        if notes is not None:
            notes[_SPAN] = span
        return use_span(span, end_on_exit=notes is None)

    def end_request(self, scope: Scope, route: str, status: int) -> None:
        """Ends the span that `start_request` has put into the notes. Does nothing if there is none. `route`: the kind
        of the requested resource, such as `manifests`. `status`: the status of the response; 0 if no response has
        started."""
        span = (scope.get("extensions") or {}).get(REQUEST_NOTES_EXTENSION, {}).get(_SPAN)
        if span is not None:
            self._end_span(span, scope, route, status)

    def trace_cached_request(self, scope: Scope, route: str) -> None:
        """Makes the span of a request that was answered from the response cache."""
        span = self._start_span(scope)
        span.set_attribute("entrepot.cached_answer", True)
        self._end_span(span, scope, route, 200)

    def trace_call(self, operation: str, repo: str) -> AbstractContextManager[object]:
        """Makes a span for one operation of the registry, which the caller runs inside the `with` block. `repo`: the
        name of the repository; empty if the operation concerns no repository or several."""
        attributes = {"entrepot.repository": repo} if repo else {}
        return self._tracer.start_as_current_span(f"registry.{operation}", attributes=attributes)

    def trace_upstream_request(self, upstream: str, endpoint: str, repo: str) -> AbstractContextManager[object]:
        """Makes one span for all requests that the caller sends to an endpoint of an upstream inside the `with` block.
        `endpoint`: the URL of the endpoint, without secrets. `repo`: the repository's name at the upstream."""
        from opentelemetry.trace import SpanKind

        attributes = {"entrepot.upstream": upstream, "entrepot.endpoint": endpoint, "entrepot.repository": repo}
        return self._tracer.start_as_current_span("upstream.request", kind=SpanKind.CLIENT, attributes=attributes)

    def trace_change(self, change: Future[Any]) -> None:
        """Makes a span for a change of the metadata. The span begins now and ends when `change` is done."""
        span = self._tracer.start_span("database.write", attributes={"db.system.name": "sqlite"})
        change.add_done_callback(lambda _: span.end())

    def close(self) -> None:
        """Sends the collector all spans that have ended and are not sent yet. Call this method in a thread: if the
        collector does not answer, the method blocks for some seconds."""
        self._provider.shutdown()

    def _start_span(self, scope: Scope) -> Any:
        from opentelemetry.trace import SpanKind

        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {
            "http.request.method": scope["method"],
            "url.path": scope["path"],
            "client.address": client_address(scope),
        }
        parent = self._propagator.extract(carrier)
        return self._tracer.start_span(scope["method"], parent, SpanKind.SERVER, attributes)

    def _end_span(self, span: Any, scope: Scope, route: str, status: int) -> None:
        from opentelemetry.trace import Status, StatusCode

        span.update_name(f"{scope['method']} {route}")
        span.set_attribute("http.route", route)
        if status:
            span.set_attribute("http.response.status_code", status)
        if status >= 500 or not status:
            span.set_status(Status(StatusCode.ERROR))
        span.end()
