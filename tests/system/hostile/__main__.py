"""Prints for how long each kind of request blocks a worker. Arguments are words that select kinds by their names. With
the argument `--once`, each kind is measured only once, even if it is above the limit."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.system.hostile import large_store
from tests.system.hostile.attacked_site import running_site
from tests.system.hostile.attacks_manifests import prepare
from tests.system.hostile.ping_watcher import PingWatcher
from tests.system.hostile.stalls import MAX_STALL_MS, TRIES, StallResult, all_attacks, measure, summary, table


def main() -> int:
    """Returns the exit code: 1 if a kind is above the limit, otherwise 0."""
    name_parts = [word.lower() for word in sys.argv[1:] if word != "--once"]
    tries = 1 if "--once" in sys.argv else TRIES
    results: dict[str, StallResult] = {}
    with tempfile.TemporaryDirectory(prefix="hostile-") as temporary_folder:
        folder = Path(temporary_folder)
        logins = large_store.build(folder / "data")
        with running_site(folder, logins) as site, PingWatcher(site.server) as watcher:
            prepare(site)
            for name, attack in all_attacks().items():
                if name_parts and not any(word in name.lower() for word in name_parts):
                    continue
                start_time = time.perf_counter()
                results[name] = measure(site, watcher, attack, tries)
                print(f"{time.perf_counter() - start_time:6.2f} s  {results[name]}", flush=True)
    print(f"\n{table(results)}\n\n{summary(results)}")
    return int(any(result.blocked_ms > MAX_STALL_MS for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
