"""`PrintableConsole`: a console of the package rich that replaces control characters. rich itself prints most control
characters unchanged, such as ESC."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from registry.printable import printable_text


class PrintableConsole(Console):
    """A console that prints `?` in place of each control character in the printed text. It does not change the control
    codes that rich itself adds, such as cursor movements."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Replaces the control characters. rich calls this method for everything that it prints."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable_text(segment.text), segment.style)
