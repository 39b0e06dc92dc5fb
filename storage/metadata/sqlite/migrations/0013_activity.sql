-- What happened in each hour (storage.activity). `start`: when the hour began, in seconds since 1970.
CREATE TABLE activity_hour (
    start         INTEGER PRIMARY KEY,
    pulls         INTEGER NOT NULL,
    pushes        INTEGER NOT NULL,
    hits          INTEGER NOT NULL,
    misses        INTEGER NOT NULL,
    fetched_bytes INTEGER NOT NULL,
    saved_bytes   INTEGER NOT NULL
) STRICT;
