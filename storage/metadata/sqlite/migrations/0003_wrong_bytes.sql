-- Endpoints of an upstream that sent bytes with another digest for a blob. They are not asked for it for a short time.
CREATE TABLE upstream_wrong (
    upstream TEXT NOT NULL,
    digest   TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    times    INTEGER NOT NULL,
    at       REAL NOT NULL,                     -- when it last did so
    PRIMARY KEY (upstream, digest, endpoint)
) STRICT, WITHOUT ROWID;
CREATE INDEX upstream_wrong_at ON upstream_wrong (at);
