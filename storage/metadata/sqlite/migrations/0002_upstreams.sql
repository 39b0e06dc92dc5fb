-- What the mirror learned about its upstream registries. These tables contain names of repositories, not row ids of
-- `repository`, because a row there would mean that the name belongs to this registry.

-- When an upstream was last asked about a tag or digest, and whether it then had the content (`known` is 1) or not (0).
CREATE TABLE upstream_check (
    repository TEXT NOT NULL,
    reference  TEXT NOT NULL,
    at         REAL NOT NULL,
    known      INTEGER NOT NULL,
    PRIMARY KEY (repository, reference)
) STRICT, WITHOUT ROWID;
CREATE INDEX upstream_check_unknown ON upstream_check (at) WHERE known = 0;

-- Bearer tokens that upstreams issued to this registry.
CREATE TABLE upstream_token (
    key     TEXT PRIMARY KEY,
    token   TEXT NOT NULL,
    expires REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX upstream_token_expires ON upstream_token (expires);

-- The rate limit of an upstream, as the upstream stated it at the time `at`.
CREATE TABLE upstream_allowance (
    upstream  TEXT PRIMARY KEY,
    at        REAL NOT NULL,
    remaining INTEGER,                          -- requests left; NULL: unknown
    most      INTEGER,                          -- requests allowed in a period; NULL: unknown
    until     REAL NOT NULL                     -- no request is sent before this time
) STRICT, WITHOUT ROWID;
