"""Entry point of `python -m registry` and of the installed command `entrepot`."""

from __future__ import annotations

from registry.cli.interrupts import exit_on_interrupt


def main() -> None:
    """Runs the command line."""
    exit_on_interrupt()  # first, so that Ctrl-C also ends the slow import cleanly
    from registry.cli.command import app  # takes most of a second

    app(prog_name="entrepot")


if __name__ == "__main__":
    main()
