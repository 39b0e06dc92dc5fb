"""`PrintableConsole`: a console of the package rich that replaces the control characters in the texts that it is given.
A normal console of rich removes only a few control characters, and prints ESC."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from registry.printable import printable_text


class PrintableConsole(Console):
    """A console that prints `?` in place of control characters in texts, tables and bars. It keeps colours, and the
    cursor movements of rich itself."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yields the segments of `renderable`. rich calls this method for everything that it prints."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable_text(segment.text), segment.style)
