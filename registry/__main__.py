"""Entry point of `python -m registry` and of the installed command `entrepot`."""

from __future__ import annotations

import gc
import os

from registry.cli.interrupts import exit_on_interrupt
from registry.cli.standard_streams import prepare_streams


def main() -> None:
    """Runs the command line."""
    prepare_streams()
    # `exit_on_interrupt` makes Ctrl-C end the program cleanly, also during the slow import below. The function also
    # unblocks SIGINT and SIGTERM, which the parent process may have blocked.
    #
    # At an upgrade, the old server blocks signals, sets `_ENTREPOT_HANDOVER`, and replaces itself by this program with
    # execve(2) (`registry.server.process.successor`). Signals must then stay blocked until the new server can act on
    # them, so `exit_on_interrupt` is not called.
    if "_ENTREPOT_HANDOVER" not in os.environ:
        exit_on_interrupt()
    gc.disable()  # garbage collection finds nothing during the import, and takes a tenth of the import's time
    from registry.cli.command import app  # this import takes nearly half a second

    gc.enable()
    app(prog_name="entrepot")


if __name__ == "__main__":
    main()
