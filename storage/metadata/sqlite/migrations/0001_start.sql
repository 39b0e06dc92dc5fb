-- Repositories and their content. Times are seconds since 1970. Digests are text, "algorithm:hex".

-- A row is never deleted. Once something was pushed to a name, the name belongs to this registry: no upstream registry
-- is asked about it, even if all of its content is deleted.
CREATE TABLE repository (
    id        INTEGER PRIMARY KEY,
    name      TEXT NOT NULL UNIQUE,
    created   REAL NOT NULL,
    manifests INTEGER NOT NULL DEFAULT 0        -- number of its manifests
) STRICT;
CREATE INDEX repository_listed ON repository (name) WHERE manifests > 0;

CREATE TABLE blob (
    id      INTEGER PRIMARY KEY,
    digest  TEXT NOT NULL UNIQUE,
    size    INTEGER NOT NULL,
    place   TEXT NOT NULL,                      -- the blob store's key for the bytes
    created REAL NOT NULL
) STRICT;

-- A link lets a repository serve a blob. Without a link, the repository does not have the blob.
CREATE TABLE blob_link (
    repository INTEGER NOT NULL REFERENCES repository (id),
    blob       INTEGER NOT NULL REFERENCES blob (id) ON DELETE RESTRICT,
    needed     REAL NOT NULL,                   -- when a client last pushed, mounted or requested it
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

-- What a manifest refers to: blobs, and the manifests that an index lists. The repository may lack them, so there are
-- no foreign keys to them.
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

-- What garbage collection may have to remove: blobs of a repository to which none of its manifests refers, and since
-- when. Repository 0 stands for no repository: the blob has no link any more.
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
    offset     INTEGER NOT NULL,                -- number of bytes that `state` covers
    state      BLOB,                            -- state of the digest's computation, to resume it
    boot       TEXT NOT NULL,                   -- boot of the machine during which the bytes were written
    started    REAL NOT NULL,
    touched    REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX upload_touched ON upload (touched);
