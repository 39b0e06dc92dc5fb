"""Entry point of `python -m registry` and of the installed command `entrepot`."""

from __future__ import annotations

from registry.cli.interrupts import exit_on_interrupt


def main() -> None:
    """Runs the command line."""
    exit_on_interrupt()  # before the import below, so that Ctrl-C ends the program cleanly during that import
    from registry.cli.command import app  # this import takes nearly a second

    app(prog_name="entrepot")


if __name__ == "__main__":
    main()
