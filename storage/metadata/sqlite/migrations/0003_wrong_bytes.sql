-- Who sent bytes of a blob that were not what its digest says: for a short while not to be asked again.
CREATE TABLE upstream_wrong (
    upstream TEXT NOT NULL,
    digest   TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    times    INTEGER NOT NULL,
    at       REAL NOT NULL,                     -- the last time
    PRIMARY KEY (upstream, digest, endpoint)
) STRICT, WITHOUT ROWID;
CREATE INDEX upstream_wrong_at ON upstream_wrong (at);
