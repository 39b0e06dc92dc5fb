-- Endpoints (servers) of an upstream that sent bytes with another digest for a blob. For a short time, the mirror does
-- not request the blob from them.
CREATE TABLE upstream_wrong (
    upstream TEXT NOT NULL,
    digest   TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    times    INTEGER NOT NULL,
    at       REAL NOT NULL,                     -- when it last did so
    PRIMARY KEY (upstream, digest, endpoint)
) STRICT, WITHOUT ROWID;
CREATE INDEX upstream_wrong_at ON upstream_wrong (at);
