"""`python -m registry`, and the entry point of the command `entrepot`."""

from __future__ import annotations

from registry.cli.interrupts import exit_on_interrupt


def main() -> None:
    exit_on_interrupt()
    from registry.cli.command import app  # takes most of a second

    app(prog_name="entrepot")


if __name__ == "__main__":
    main()
