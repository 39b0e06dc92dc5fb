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
    # import. `exit_on_interrupt` also unblocks signals, so it is not called if an old version of the server runs this
    # program (`_ENTREPOT_HANDOVER`). To be replaced by this program, the old version blocks the signals of its own
    # process and then executes this program in that process (`registry.server.process.successor`). The signals have to
    # stay blocked until the new server can act on them.
    if "_ENTREPOT_HANDOVER" not in os.environ:
        exit_on_interrupt()
    gc.disable()  # garbage collections would find nothing, and take a tenth of the time of the import
    from registry.cli.command import app  # takes nearly half a second

    gc.enable()
    app(prog_name="entrepot")


if __name__ == "__main__":
    main()
