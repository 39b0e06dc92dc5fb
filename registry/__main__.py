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
    # import. `_ENTREPOT_HANDOVER` is set if an old version of the server has started this program
    # (`registry.server.process.successor`). If this program takes over from it, the old version has blocked the signals
    # of this process, and the new server unblocks them when it can act on them.
    if "_ENTREPOT_HANDOVER" not in os.environ:
        exit_on_interrupt()
    gc.disable()  # garbage collections would find nothing, and take a tenth of the time of the import
    from registry.cli.command import app  # takes nearly half a second

    gc.enable()
    app(prog_name="entrepot")


if __name__ == "__main__":
    main()
