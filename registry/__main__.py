"""`python -m registry`, and the entry point of the command `entrepot`."""

from __future__ import annotations

from registry.cli.command import app


def main() -> None:
    app(prog_name="entrepot")


if __name__ == "__main__":
    main()
