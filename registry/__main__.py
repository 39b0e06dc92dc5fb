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
    # import. `exit_on_interrupt` also unblocks signals.
    #
    # At an upgrade, the old version of the server sets `_ENTREPOT_HANDOVER`, blocks signals, and calls execve(2) with
    # this program (`registry.server.process.successor`). So this program replaces the old version in the same process,
    # and signals are still blocked. They have to stay blocked until the new server can act on them. Therefore
    # `exit_on_interrupt` is not called in this case.
    if "_ENTREPOT_HANDOVER" not in os.environ:
        exit_on_interrupt()
    gc.disable()  # garbage collections would find nothing, and take a tenth of the time of the import
    from registry.cli.command import app  # takes nearly half a second

    gc.enable()
    app(prog_name="entrepot")


if __name__ == "__main__":
    main()
