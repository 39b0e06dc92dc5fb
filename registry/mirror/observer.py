"""`MirrorObserver`: the interface of objects that count the upstream requests and the fills of one mirror. A *fill* is
the work of one process to get one blob. An *endpoint* is one of the base URLs of the upstream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Final, Literal, Protocol

from storage.errors import RegistryError


class MirrorObserver(Protocol):
    """Receives reports about the requests and fills of the mirror of one upstream. The methods are called on the event
    loop. They return immediately and raise nothing."""

    def trace_request(self, endpoint: str, repo: str) -> AbstractContextManager[object]:
        """Returns a context manager that records a trace of the requests inside the `with` block. Inside the block, the
        mirror does one thing at one endpoint, such as getting one manifest. This can take several requests. `endpoint`:
        the URL of the endpoint, without secrets. `repo`: the repository's name at the upstream."""
        ...

    def on_response(self, seconds: float) -> None:
        """Called when the mirror has received the head of a response. `seconds`: the time since it sent the request."""
        ...

    def on_error(self, error: RegistryError) -> None:
        """Called when a request to an endpoint has failed."""
        ...

    def on_breaker(self, *, opened: bool) -> None:
        """Called when the circuit breaker of an endpoint opens or closes. `opened`: whether it opens."""
        ...

    def on_refused(self) -> None:
        """Called when the mirror sends no request, because the circuit breakers of all endpoints are open."""
        ...

    def on_fetched(self, content: Literal["manifest", "blob"], size: int) -> None:
        """Called when `size` bytes of a manifest or blob have been received. `content`: which of the two it is."""
        ...

    def on_fill_started(self) -> None:
        """Called when a fill starts in this process. The fill downloads the blob, or waits while another process
        downloads the blob."""
        ...

    def on_fill_ended(self, error: RegistryError | None, *, is_abandoned: bool) -> None:
        """Called at the end of each fill. `error`: why the fill failed or was stopped; None: the blob is stored.
        `is_abandoned`: whether the fill was stopped, because no client of this process needs the blob or because the
        process stops."""
        ...


class _NoObserver:
    """A `MirrorObserver` that counts nothing."""

    def trace_request(self, endpoint: str, repo: str) -> AbstractContextManager[object]:
        return nullcontext()

    def on_response(self, seconds: float) -> None:
        return

    def on_error(self, error: RegistryError) -> None:
        return

    def on_breaker(self, *, opened: bool) -> None:
        return

    def on_refused(self) -> None:
        return

    def on_fetched(self, content: Literal["manifest", "blob"], size: int) -> None:
        return

    def on_fill_started(self) -> None:
        return

    def on_fill_ended(self, error: RegistryError | None, *, is_abandoned: bool) -> None:
        return


UNOBSERVED: Final[MirrorObserver] = _NoObserver()
"""An observer that counts nothing."""
