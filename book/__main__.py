"""`python -m book FOLDER` builds the documentation site (the book) into a folder."""

from __future__ import annotations

import sys
from pathlib import Path

from book.site import BuildFailed, build_site


def main(arguments: list[str]) -> int:
    """Builds the site, and returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m book FOLDER", file=sys.stderr)
        return 2
    target = Path(arguments[0]).absolute()
    try:
        build_site(target)
    except BuildFailed as error:
        print(f"the book cannot be built: {error}", file=sys.stderr)
        return 1
    print(f"the book is in {target / 'index.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
