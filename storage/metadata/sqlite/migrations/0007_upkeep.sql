-- Upkeep: pulls, deleted manifests, use of space, mirrored tags over time, damaged blobs, and jobs. Times are seconds
-- since 1970.

-- When a manifest was last pulled, and how often. `upstream` is the name of the upstream registry whose mirror stores
-- the manifest; '' for a manifest that was pushed. A mirrored manifest gets its row when it is stored, with 0 pulls.
CREATE TABLE manifest_pull (
    manifest INTEGER PRIMARY KEY REFERENCES manifest (id),
    upstream TEXT NOT NULL,
    last     REAL NOT NULL,
    pulls    INTEGER NOT NULL
) STRICT;
CREATE INDEX manifest_pull_last ON manifest_pull (upstream, last);
-- What was mirrored before this table existed counts as pulled now. Only mirrors make rows in `upstream_check`.
INSERT INTO manifest_pull (manifest, upstream, last, pulls)
SELECT m.id, substr(r.name, 1, instr(r.name, '/') - 1), unixepoch('subsec') + 0.0, 0
  FROM repository r JOIN manifest m ON m.repository = r.id
 WHERE r.name IN (SELECT repository FROM upstream_check) AND instr(r.name, '/') > 1;
-- Since when pulls are recorded. The table is empty if they have been recorded since the first push.
CREATE TABLE pull_recording (since REAL NOT NULL) STRICT;
INSERT INTO pull_recording SELECT unixepoch('subsec') + 0.0 WHERE EXISTS (SELECT 1 FROM manifest);

-- Deleted manifests that can still be put back. Garbage collection deletes a row when its grace period is over.
CREATE TABLE deleted_manifest (
    repository INTEGER NOT NULL REFERENCES repository (id),
    digest     TEXT NOT NULL,
    media_type TEXT NOT NULL,
    pushed     REAL NOT NULL,
    deleted    REAL NOT NULL,
    body       BLOB NOT NULL,
    PRIMARY KEY (repository, digest)
) STRICT;
CREATE INDEX deleted_manifest_deleted ON deleted_manifest (deleted);

-- The history of one tag, newest entry first.
CREATE INDEX tag_history_tag ON tag_history (repository, tag, id);

-- A scope is a set of repositories whose use of space is counted: those whose names begin with `prefix`, which ends with
-- a slash or is empty. `blobs` and `bytes` count each blob of the scope once. `complete` is 0 while an existing store is
-- being counted.
CREATE TABLE usage_scope (
    id       INTEGER PRIMARY KEY,
    prefix   TEXT NOT NULL UNIQUE,
    blobs    INTEGER NOT NULL DEFAULT 0,
    bytes    INTEGER NOT NULL DEFAULT 0,
    tags     INTEGER NOT NULL DEFAULT 0,
    complete INTEGER NOT NULL
) STRICT;
-- In how many repositories of the scope a blob has a link.
CREATE TABLE usage_blob (
    scope INTEGER NOT NULL REFERENCES usage_scope (id),
    blob  INTEGER NOT NULL REFERENCES blob (id),
    links INTEGER NOT NULL,
    PRIMARY KEY (scope, blob)
) STRICT, WITHOUT ROWID;
CREATE INDEX usage_blob_blob ON usage_blob (blob);

-- What an upstream's tag pointed at: `digest` from `since` until the next row of the same tag.
CREATE TABLE upstream_tag (
    repository TEXT NOT NULL,
    tag        TEXT NOT NULL,
    since      REAL NOT NULL,
    digest     TEXT NOT NULL,
    PRIMARY KEY (repository, tag, since)
) STRICT, WITHOUT ROWID;
-- Mirrored tags that stay at one digest, whatever the upstream says.
CREATE TABLE frozen_tag (
    repository TEXT NOT NULL,
    tag        TEXT NOT NULL,
    digest     TEXT NOT NULL,
    at         REAL NOT NULL,
    actor      TEXT NOT NULL,
    PRIMARY KEY (repository, tag)
) STRICT, WITHOUT ROWID;

-- Blobs whose stored bytes no longer have their digest. The row of such a blob in `blob` has an empty `place` until its
-- bytes are stored again. `place` here is the key under which the blob store keeps the damaged bytes; '' if it keeps
-- none.
CREATE TABLE damaged_blob (
    digest TEXT PRIMARY KEY,
    found  REAL NOT NULL,
    reason TEXT NOT NULL,
    place  TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Long work that runs in the background. `state`: queued, running, done, failed, stopped. `holder` says which process
-- runs it, for people. `position` is where the work continues after a restart (JSON).
CREATE TABLE job (
    id        INTEGER PRIMARY KEY,
    kind      TEXT NOT NULL,
    arguments TEXT NOT NULL,                    -- JSON
    state     TEXT NOT NULL,
    actor     TEXT NOT NULL,
    holder    TEXT NOT NULL,
    resumable INTEGER NOT NULL,                 -- 1: a server continues the job after a restart
    stopping  INTEGER NOT NULL DEFAULT 0,       -- 1: somebody asked to stop it
    created   REAL NOT NULL,
    updated   REAL NOT NULL,
    ended     REAL,
    done      INTEGER NOT NULL DEFAULT 0,
    total     INTEGER,
    unit      TEXT NOT NULL DEFAULT '',
    message   TEXT NOT NULL DEFAULT '',
    position  TEXT,
    result    TEXT                              -- JSON
) STRICT;
CREATE INDEX job_active ON job (kind, id) WHERE state IN ('queued', 'running');
