"""The most expensive requests, against a real server: how long does one of them block a worker, and how much memory do
many of them use?

- `stalls` lists every kind of request with the limit that applies to it; the modules `attacks_*` build them. A kind is
  the request of one client, or a few that belong together, such as the chunks of one upload.
- `ping_watcher` is a separate process that pings each worker every two milliseconds, and measures the time until the
  response. `stalls` sends a kind of request while it runs.
- `attacked_site` starts the attacked server: two workers over a large store (`large_store`), with accounts, and with
  upstreams that send bad responses (`bad_upstreams`).
- `memory_growth` sends two hundred requests at the same time.

How a delay by the worker is told from a delay by the machine: for each thread, the kernel counts the time for which it
ran, and the time for which it was ready and had no CPU (`/proc/PID/task/TID/schedstat`). The latter is subtracted from
the time of a slow ping: that of the worker's main thread, that of the other thread that waited longest (it may have
held the interpreter lock), and that of the watcher. The rest is the time for which the worker itself delayed the ping:
because Python ran on its event loop, because another thread held the interpreter lock, or because of a blocking call.
The result is never less than the CPU time of the main thread during the ping, which is certain. The host of a virtual
machine can take the CPU away without being seen, but not repeatedly. So a kind above the limit is sent up to three
times, and the smallest result counts: a real delay occurs each time. On a busy machine, the result may be too small
because of the interpreter lock, and never too large.

    python -m tests.system.hostile                 # prints a table of all kinds
    python -m tests.system.hostile catalog range   # those with one of these words in the name
"""
