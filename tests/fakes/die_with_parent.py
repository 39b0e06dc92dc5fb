"""`python -m tests.fakes.die_with_parent PARENT PROGRAM …` replaces itself with the program (exec). The kernel kills
the program when the process PARENT ends."""

from __future__ import annotations

import os
import sys

from registry.server.kernel import die_with_parent

if __name__ == "__main__":
    # The kernel keeps this setting of prctl(2) when the process executes the program.
    if not die_with_parent(int(sys.argv[1])):
        sys.exit("the parent is gone")
    os.execvp(sys.argv[2], sys.argv[2:])
