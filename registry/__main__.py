"""Entry point of `python -m registry` and of the installed command `entrepot`."""

from __future__ import annotations

import gc
import os

from registry.cli.interrupts import exit_on_interrupt
from registry.cli.standard_streams import prepare_streams


def main() -> None:
    """Runs the command line."""
    prepare_streams()
    # `exit_on_interrupt` is called before the slow import below, so that Ctrl-C ends the program cleanly during the
    # import. An old version of the server sets `_ENTREPOT_HANDOVER` if this program takes over from it
    # (`registry.server.process.successor`). The old version has then blocked the signals of this process, and the new
    # server unblocks them when it can act on them.
    if "_ENTREPOT_HANDOVER" not in os.environ:
        exit_on_interrupt()
    gc.disable()  # garbage collections would find nothing, and take a tenth of the time of the import
    from registry.cli.command import app  # takes nearly half a second

    gc.enable()
    app(prog_name="entrepot")


if __name__ == "__main__":
    main()
