-- What the mirror remembers of its upstreams. Repositories stand here by name: being asked about makes none of them ours.

-- When an upstream was last asked about a tag or digest, and whether it had it.
CREATE TABLE upstream_check (
    repository TEXT NOT NULL,
    reference  TEXT NOT NULL,
    at         REAL NOT NULL,
    known      INTEGER NOT NULL,
    PRIMARY KEY (repository, reference)
) STRICT, WITHOUT ROWID;
CREATE INDEX upstream_check_unknown ON upstream_check (at) WHERE known = 0;

CREATE TABLE upstream_token (
    key     TEXT PRIMARY KEY,
    token   TEXT NOT NULL,
    expires REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX upstream_token_expires ON upstream_token (expires);

-- What an upstream still lets us ask, as of `at`.
CREATE TABLE upstream_allowance (
    upstream  TEXT PRIMARY KEY,
    at        REAL NOT NULL,
    remaining INTEGER,                          -- NULL: it does not say
    most      INTEGER,                          -- of so many
    until     REAL NOT NULL                     -- nothing before
) STRICT, WITHOUT ROWID;
