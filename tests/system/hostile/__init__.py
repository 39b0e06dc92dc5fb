"""Sends the most expensive requests to a real server, and measures for how long one of them blocks a worker, and how
much memory many of them use.

- `stalls` collects all kinds of requests, which the modules `attacks_*` define, each with the limit that applies to it.
  A kind is one request, or a few requests that belong together, such as those of one upload.
- `ping_watcher` is a separate process that pings each worker every two milliseconds, and measures the time until the
  response. `stalls` sends a kind of request while it runs.
- `attacked_site` starts the attacked server: two workers over a large store (`large_store`), with accounts, and with
  upstreams that send bad responses (`bad_upstreams`).
- `memory_growth` sends two hundred requests at the same time.

A slow ping may be the fault of the worker or of a busy machine. For each thread, the kernel counts the time for which
the thread ran, and the time for which it was ready but had no CPU (`/proc/PID/task/TID/schedstat`). The waiting times
of three threads are subtracted from the time of a slow ping: the times for which the main thread of the worker, the
watcher, and another thread of the worker had no CPU. This other thread is the one that waited longest; it may have held
the interpreter lock. The rest is the time for which the worker itself delayed the ping: Python code ran on its event
loop, another thread held the interpreter lock, or a system call blocked. The result is at least the CPU time of the
main thread during the ping. The host of a virtual machine can take the CPU away unnoticed. A kind above the limit is
therefore sent up to three times, and the smallest result counts, because a real delay occurs each time. On a busy
machine, the result may be too small because of the interpreter lock, but never too large.

    python -m tests.system.hostile                 # prints a table of all kinds
    python -m tests.system.hostile catalog range   # prints only the kinds with one of these words in the name
"""
