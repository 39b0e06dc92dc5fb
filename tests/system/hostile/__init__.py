"""The worst requests there are, against a real server: how long does one of them hold a worker, and what memory do
many of them take?

- `kinds` lists every kind of request with the limit it sits at; `kinds_*` build them. A kind is one client's request,
  or the few that belong together, such as the chunks of one upload.
- `watcher` is a process of its own that pings each worker every two milliseconds and measures how long the answer
  took. `stalls` runs a kind under it.
- `site` starts what is attacked: a server with two workers over a large store (`large_store`), with accounts, and
  upstreams that answer badly (`bad_upstreams`).
- `memory` sends two hundred at once.

How a stall of the worker is told from a stall of the machine: the kernel counts, for each thread, the time it ran, and
the time it was ready to run and had no CPU (`/proc/PID/task/TID/schedstat`). The latter is taken off a slow ping's
duration: of the worker's main thread, of the one other thread that waited most (it may have held the interpreter lock
meanwhile), and of the watcher. What is left is time in which the worker itself kept the ping waiting: by running Python
on its loop, by holding the interpreter lock in another thread, or by a call that blocks. It is never less than the CPU
time of the main thread during the ping, which is certain. A virtual machine's host can also take the CPU away unseen;
that does not repeat. So a kind above the bound runs up to three times, and its least figure counts: a real stall is
there each time. On a busy machine the figure errs downwards where the interpreter lock is concerned, never upwards.

    python -m tests.system.hostile                 # prints a table of all kinds
    python -m tests.system.hostile catalog range   # those whose name has one of these words
"""
