-- What exists, who points at what. Times are seconds since 1970. Digests are text, "algorithm:hex".

-- A row stays for ever once something was pushed: the name is ours from then on, also when all of it is deleted.
CREATE TABLE repository (
    id        INTEGER PRIMARY KEY,
    name      TEXT NOT NULL UNIQUE,
    created   REAL NOT NULL,
    manifests INTEGER NOT NULL DEFAULT 0        -- how many it holds
) STRICT;
CREATE INDEX repository_listed ON repository (name) WHERE manifests > 0;

CREATE TABLE blob (
    id      INTEGER PRIMARY KEY,
    digest  TEXT NOT NULL UNIQUE,
    size    INTEGER NOT NULL,
    place   TEXT NOT NULL,                      -- opaque: the blob store understands it
    created REAL NOT NULL
) STRICT;

-- A repository's claim to a blob; a blob is served from a repository only through it.
CREATE TABLE blob_link (
    repository INTEGER NOT NULL REFERENCES repository (id),
    blob       INTEGER NOT NULL REFERENCES blob (id) ON DELETE RESTRICT,
    needed     REAL NOT NULL,                   -- when somebody last pushed, mounted or asked for it
    PRIMARY KEY (repository, blob)
) STRICT, WITHOUT ROWID;
CREATE INDEX blob_link_blob ON blob_link (blob);

CREATE TABLE manifest (
    id            INTEGER PRIMARY KEY,
    repository    INTEGER NOT NULL REFERENCES repository (id),
    digest        TEXT NOT NULL,
    media_type    TEXT NOT NULL,
    size          INTEGER NOT NULL,
    subject       TEXT,
    artifact_type TEXT,
    annotations   TEXT,                         -- JSON
    pushed        REAL NOT NULL,
    body          BLOB NOT NULL,
    UNIQUE (repository, digest)
) STRICT;
CREATE INDEX manifest_subject ON manifest (repository, subject, digest) WHERE subject IS NOT NULL;

-- What a manifest refers to. No foreign keys to blob and manifest: both may be missing.
CREATE TABLE manifest_blob (
    repository INTEGER NOT NULL,
    digest     TEXT NOT NULL,
    manifest   INTEGER NOT NULL REFERENCES manifest (id),
    PRIMARY KEY (repository, digest, manifest)
) STRICT, WITHOUT ROWID;
CREATE INDEX manifest_blob_manifest ON manifest_blob (manifest);
CREATE TABLE manifest_child (
    repository INTEGER NOT NULL,
    digest     TEXT NOT NULL,
    manifest   INTEGER NOT NULL REFERENCES manifest (id),
    PRIMARY KEY (repository, digest, manifest)
) STRICT, WITHOUT ROWID;
CREATE INDEX manifest_child_manifest ON manifest_child (manifest);

CREATE TABLE tag (
    repository INTEGER NOT NULL REFERENCES repository (id),
    name       TEXT NOT NULL,
    manifest   INTEGER NOT NULL REFERENCES manifest (id),
    updated    REAL NOT NULL,
    PRIMARY KEY (repository, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX tag_manifest ON tag (manifest);

CREATE TABLE tag_history (
    id         INTEGER PRIMARY KEY,
    repository INTEGER NOT NULL REFERENCES repository (id),
    tag        TEXT NOT NULL,
    digest     TEXT,                            -- NULL: the tag was deleted
    at         REAL NOT NULL,
    actor      TEXT NOT NULL,
    address    TEXT NOT NULL,
    request_id TEXT NOT NULL,
    user_agent TEXT NOT NULL
) STRICT;
CREATE INDEX tag_history_tag ON tag_history (repository, tag, id);

-- Digests whose last reference a transaction just dropped, or that never had one. Repository 0: the blob as a whole.
CREATE TABLE collect_queue (
    repository INTEGER NOT NULL,
    digest     TEXT NOT NULL,
    since      REAL NOT NULL,
    PRIMARY KEY (repository, digest)
) STRICT, WITHOUT ROWID;
CREATE INDEX collect_queue_since ON collect_queue (since);

CREATE TABLE upload (
    id         TEXT PRIMARY KEY,
    repository TEXT NOT NULL,
    algorithm  TEXT NOT NULL,
    offset     INTEGER NOT NULL,                -- bytes that `state` covers
    state      BLOB,                            -- the digest so far, to be taken up again
    boot       TEXT NOT NULL,                   -- which run of the machine wrote the bytes
    started    REAL NOT NULL,
    touched    REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX upload_touched ON upload (touched);
