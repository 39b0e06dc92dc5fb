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

-- Deleted manifests that can still be put back. Garbage collection deletes a row when its grace period is over. A
-- manifest of a repository is either here or in `manifest`.
CREATE TABLE deleted_manifest (
    repository INTEGER NOT NULL REFERENCES repository (id),
    digest     TEXT NOT NULL,
    media_type TEXT NOT NULL,
    subject    TEXT,
    pushed     REAL NOT NULL,
    deleted    REAL NOT NULL,
    body       BLOB NOT NULL,
    PRIMARY KEY (repository, digest)
) STRICT;
CREATE INDEX deleted_manifest_deleted ON deleted_manifest (deleted);
CREATE INDEX deleted_manifest_repository ON deleted_manifest (repository, deleted);
CREATE INDEX deleted_manifest_subject ON deleted_manifest (repository, subject) WHERE subject IS NOT NULL;

-- The history of one tag, newest entry first.
CREATE INDEX tag_history_tag ON tag_history (repository, tag, id);

-- A usage scope is a set of repositories whose use of space is counted: those of a quota or of a mirror. A repository
-- belongs to a scope if its name begins with one of `prefixes` and with none of `excluded` (JSON arrays). `blobs` and
-- `bytes` count each blob of the scope once. While an existing store is being counted, `complete` is 0, and
-- `position` is the highest row id of a repository that was looked at. A scope that is no longer in the settings has the
-- name 'removed ID' until its rows are deleted. The triggers below keep the counts exact in every transaction that adds
-- or removes a link or a tag, and abort it if it makes a scope grow beyond its quota.
CREATE TABLE usage_scope (
    id        INTEGER PRIMARY KEY,
    name      TEXT NOT NULL UNIQUE,
    prefixes  TEXT NOT NULL,
    excluded  TEXT NOT NULL,
    upstream  TEXT,                             -- whose mirrored repositories these are; NULL: not those of one upstream
    max_bytes INTEGER,                          -- quota; NULL: none
    max_tags  INTEGER,                          -- quota; NULL: none
    blobs     INTEGER NOT NULL DEFAULT 0,
    bytes     INTEGER NOT NULL DEFAULT 0,
    tags      INTEGER NOT NULL DEFAULT 0,
    complete  INTEGER NOT NULL DEFAULT 0,
    position  INTEGER NOT NULL DEFAULT 0
) STRICT;
-- Which repositories belong to a scope, and what of them is counted: links to blobs with row ids up to `links_to`, tags
-- with names up to `tags_to`; NULL: all. `manifests_to`: manifests with row ids up to this are in `cached_manifest`.
CREATE TABLE usage_member (
    repository   INTEGER NOT NULL REFERENCES repository (id),
    scope        INTEGER NOT NULL REFERENCES usage_scope (id),
    links_to     INTEGER,
    tags_to      TEXT,
    manifests_to INTEGER,
    PRIMARY KEY (repository, scope)
) STRICT, WITHOUT ROWID;
CREATE INDEX usage_member_scope ON usage_member (scope, repository);
CREATE INDEX usage_member_uncounted ON usage_member (scope)
    WHERE links_to IS NOT NULL OR tags_to IS NOT NULL OR manifests_to IS NOT NULL;
-- In how many repositories of the scope a blob has a link. `size` is that of the blob.
CREATE TABLE usage_blob (
    scope INTEGER NOT NULL REFERENCES usage_scope (id),
    blob  INTEGER NOT NULL REFERENCES blob (id) ON DELETE CASCADE,
    size  INTEGER NOT NULL,
    links INTEGER NOT NULL,
    PRIMARY KEY (scope, blob)
) STRICT, WITHOUT ROWID;
CREATE INDEX usage_blob_blob ON usage_blob (blob);

CREATE TRIGGER usage_repository_added AFTER INSERT ON repository BEGIN
    INSERT INTO usage_member (repository, scope)
    SELECT NEW.id, s.id FROM usage_scope s
     WHERE EXISTS (SELECT 1 FROM json_each(s.prefixes) p WHERE substr(NEW.name, 1, length(p.value)) = p.value)
       AND NOT EXISTS (SELECT 1 FROM json_each(s.excluded) p WHERE substr(NEW.name, 1, length(p.value)) = p.value);
END;
CREATE TRIGGER usage_link_added AFTER INSERT ON blob_link
  WHEN EXISTS (SELECT 1 FROM usage_member WHERE repository = NEW.repository)
BEGIN
    -- Not an upsert, because the conflict policy of the statement that fires the trigger would replace its own.
    UPDATE usage_blob SET links = links + 1
     WHERE blob = NEW.blob AND scope IN (
           SELECT scope FROM usage_member
            WHERE repository = NEW.repository AND (links_to IS NULL OR NEW.blob <= links_to));
    INSERT INTO usage_blob (scope, blob, size, links)
    SELECT m.scope, NEW.blob, b.size, 1 FROM usage_member m JOIN blob b ON b.id = NEW.blob
     WHERE m.repository = NEW.repository AND (m.links_to IS NULL OR NEW.blob <= m.links_to)
       AND NOT EXISTS (SELECT 1 FROM usage_blob u WHERE u.scope = m.scope AND u.blob = NEW.blob);
END;
CREATE TRIGGER usage_link_removed AFTER DELETE ON blob_link
  WHEN EXISTS (SELECT 1 FROM usage_member WHERE repository = OLD.repository)
BEGIN
    UPDATE usage_blob SET links = links - 1
     WHERE blob = OLD.blob AND scope IN (
           SELECT scope FROM usage_member
            WHERE repository = OLD.repository AND (links_to IS NULL OR OLD.blob <= links_to));
    DELETE FROM usage_blob WHERE blob = OLD.blob AND links <= 0;
END;
CREATE TRIGGER usage_blob_added AFTER INSERT ON usage_blob BEGIN
    UPDATE usage_scope SET blobs = blobs + 1, bytes = bytes + NEW.size WHERE id = NEW.scope;
    SELECT raise(ABORT, 'quota ' || id || ' bytes ' || NEW.size) FROM usage_scope
     WHERE id = NEW.scope AND complete = 1 AND bytes > max_bytes;
END;
CREATE TRIGGER usage_blob_removed AFTER DELETE ON usage_blob BEGIN
    UPDATE usage_scope SET blobs = blobs - 1, bytes = bytes - OLD.size WHERE id = OLD.scope;
END;
CREATE TRIGGER usage_tag_added AFTER INSERT ON tag
  WHEN EXISTS (SELECT 1 FROM usage_member WHERE repository = NEW.repository)
BEGIN
    UPDATE usage_scope SET tags = tags + 1
     WHERE id IN (SELECT scope FROM usage_member
                   WHERE repository = NEW.repository AND (tags_to IS NULL OR NEW.name <= tags_to));
    SELECT raise(ABORT, 'quota ' || s.id || ' tags 1') FROM usage_member m JOIN usage_scope s ON s.id = m.scope
     WHERE m.repository = NEW.repository AND s.complete = 1 AND s.tags > s.max_tags;
END;
CREATE TRIGGER usage_tag_removed AFTER DELETE ON tag
  WHEN EXISTS (SELECT 1 FROM usage_member WHERE repository = OLD.repository)
BEGIN
    UPDATE usage_scope SET tags = tags - 1
     WHERE id IN (SELECT scope FROM usage_member
                   WHERE repository = OLD.repository AND (tags_to IS NULL OR OLD.name <= tags_to));
END;

-- The mirrored manifests in the order in which eviction looks at them, lowest `rank` first. `rank` is a time. A pull
-- does not change it, so the manifest may have been pulled after its rank. If eviction comes to such a manifest, it
-- stores the time of the pull as the new rank.
CREATE TABLE cached_manifest (
    manifest INTEGER PRIMARY KEY REFERENCES manifest (id) ON DELETE CASCADE,
    upstream TEXT NOT NULL,
    rank     REAL NOT NULL
) STRICT;
CREATE INDEX cached_manifest_rank ON cached_manifest (upstream, rank);
CREATE TRIGGER cached_manifest_added AFTER INSERT ON manifest
  WHEN EXISTS (SELECT 1 FROM usage_member WHERE repository = NEW.repository)
BEGIN
    INSERT INTO cached_manifest (manifest, upstream, rank)
    SELECT NEW.id, s.upstream, NEW.pushed FROM usage_member m JOIN usage_scope s ON s.id = m.scope
     WHERE m.repository = NEW.repository AND s.upstream IS NOT NULL
        ON CONFLICT DO NOTHING;
END;

-- What an upstream's tag pointed at: `digest` from `since` until the next row of the same tag.
CREATE TABLE upstream_tag (
    repository TEXT NOT NULL,
    tag        TEXT NOT NULL,
    since      REAL NOT NULL,
    digest     TEXT NOT NULL,
    PRIMARY KEY (repository, tag, since)
) STRICT, WITHOUT ROWID;
CREATE INDEX upstream_tag_since ON upstream_tag (since);
CREATE INDEX upstream_tag_digest ON upstream_tag (repository, digest);
-- Each mirrored tag that is stored already gets a row: its digest, since the time at which the mirror last changed the
-- tag.
INSERT INTO upstream_tag (repository, tag, since, digest)
SELECT r.name, t.name, t.updated, m.digest
  FROM upstream_check c JOIN repository r ON r.name = c.repository
       JOIN tag t ON t.repository = r.id AND t.name = c.reference JOIN manifest m ON m.id = t.manifest
 WHERE c.known = 1;
-- Mirrored tags that stay at one digest, whatever the upstream says.
CREATE TABLE frozen_tag (
    repository TEXT NOT NULL,
    tag        TEXT NOT NULL,
    digest     TEXT NOT NULL,
    at         REAL NOT NULL,
    actor      TEXT NOT NULL,
    PRIMARY KEY (repository, tag)
) STRICT, WITHOUT ROWID;

-- Blobs whose stored bytes no longer have their digest, or are missing. The row of such a blob in `blob` has an empty
-- `place` until its bytes are stored again. `place` here is the key under which the blob store keeps the damaged bytes;
-- '' if it keeps none. `former` is the key under which the bytes were before.
CREATE TABLE damaged_blob (
    digest TEXT PRIMARY KEY,
    found  REAL NOT NULL,
    reason TEXT NOT NULL,
    place  TEXT NOT NULL,
    former TEXT NOT NULL DEFAULT ''
) STRICT, WITHOUT ROWID;
-- Manifests whose stored body no longer has their digest. The row of such a manifest in `manifest` has an empty `body`
-- and the `size` 0 until the manifest is stored again. `size` and `body` here are what it had.
CREATE TABLE damaged_manifest (
    repository INTEGER NOT NULL REFERENCES repository (id),
    digest     TEXT NOT NULL,
    found      REAL NOT NULL,
    reason     TEXT NOT NULL,
    size       INTEGER NOT NULL,
    body       BLOB NOT NULL,
    PRIMARY KEY (repository, digest)
) STRICT;
-- A round of scrub: all blobs with ids up to `until_blob` and all manifests with ids up to `until_manifest` are read
-- and hashed. Those with ids up to `after_blob` and `after_manifest` are done. `bytes` of the `total_bytes` of the
-- blobs are read; `damaged` counts the blobs and manifests that were found damaged. `ended` is NULL while the round is
-- not complete.
CREATE TABLE scrub_round (
    id             INTEGER PRIMARY KEY,
    started        REAL NOT NULL,
    updated        REAL NOT NULL,
    ended          REAL,
    until_blob     INTEGER NOT NULL,
    until_manifest INTEGER NOT NULL,
    total_bytes    INTEGER NOT NULL,
    after_blob     INTEGER NOT NULL DEFAULT 0,
    after_manifest INTEGER NOT NULL DEFAULT 0,
    blobs          INTEGER NOT NULL DEFAULT 0,
    manifests      INTEGER NOT NULL DEFAULT 0,
    bytes          INTEGER NOT NULL DEFAULT 0,
    damaged        INTEGER NOT NULL DEFAULT 0
) STRICT;

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
