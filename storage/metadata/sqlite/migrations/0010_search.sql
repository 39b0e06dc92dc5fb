-- The search index. A push does not write to it. Instead, a process adds the new rows of the tables of the content, in
-- small transactions; `search_progress` says how far it has come. For each row that a search finds here, it reads the
-- tables of the content, so it does not return deleted content.

-- How far the index has come: row ids of the last repository, manifest, blob and line of `tag_history` that it has
-- processed. `tag_repository` and `tag_name` are the last tag that was read from the table `tag` itself, for a store
-- that is older than the index; NULL: all were read.
CREATE TABLE search_progress (
    repositories   INTEGER NOT NULL,
    manifests      INTEGER NOT NULL,
    blobs          INTEGER NOT NULL,
    tag_changes    INTEGER NOT NULL,
    tag_repository INTEGER,
    tag_name       TEXT
) STRICT;
INSERT INTO search_progress
SELECT 0, 0, coalesce((SELECT max(id) FROM blob), 0), coalesce((SELECT max(id) FROM tag_history), 0),
       iif(EXISTS (SELECT 1 FROM tag), 0, NULL), iif(EXISTS (SELECT 1 FROM tag), '', NULL);

-- The names of repositories, each after '^', by all groups of three characters. The row id is that of the repository.
CREATE VIRTUAL TABLE search_name USING fts5 (name, content = '', detail = 'none', tokenize = 'trigram');

-- Tags by their words, in lower case: the whole tag, and its rest after each '-' and '_'.
CREATE TABLE search_tag (
    word       TEXT NOT NULL,
    repository INTEGER NOT NULL,
    tag        TEXT NOT NULL,
    PRIMARY KEY (word, repository, tag)
) STRICT, WITHOUT ROWID;
CREATE INDEX search_tag_repository ON search_tag (repository, word);

-- Manifests by the first 16 hexadecimal digits of their digests.
CREATE TABLE search_manifest (
    hex      TEXT NOT NULL,
    manifest INTEGER NOT NULL,
    PRIMARY KEY (hex, manifest)
) STRICT, WITHOUT ROWID;

-- The labels and annotations of a manifest, one a line: a name, '=' and a value. The words of `text` are in
-- `search_word`, which also has the row id of the repository.
CREATE TABLE search_label (
    manifest INTEGER PRIMARY KEY,
    text     TEXT NOT NULL
) STRICT;
CREATE VIRTUAL TABLE search_word USING fts5 (repository, text, content = '', contentless_delete = 1, tokenize = 'unicode61');

-- Manifests to index again. When they were indexed, their config, which has the labels, could not be read (`digest`:
-- that of the config), or they were damaged (`digest` is empty).
CREATE TABLE search_missing_config (
    digest   TEXT NOT NULL,
    manifest INTEGER NOT NULL,
    PRIMARY KEY (digest, manifest)
) STRICT, WITHOUT ROWID;
CREATE INDEX search_missing_config_manifest ON search_missing_config (manifest);

-- SQLite gives a new row the id after the highest id in the table. If the row with the highest id is deleted, the next
-- row gets its id again. So these triggers move the position back, and it is never above the highest id.
CREATE TRIGGER search_manifest_removed AFTER DELETE ON manifest BEGIN
    DELETE FROM search_manifest WHERE hex = substr(OLD.digest, instr(OLD.digest, ':') + 1, 16) AND manifest = OLD.id;
    DELETE FROM search_missing_config WHERE manifest = OLD.id;
    DELETE FROM search_word WHERE rowid IN (SELECT manifest FROM search_label WHERE manifest = OLD.id);
    DELETE FROM search_label WHERE manifest = OLD.id;
    UPDATE search_progress SET manifests = (SELECT coalesce(max(id), 0) FROM manifest)
     WHERE manifests > (SELECT coalesce(max(id), 0) FROM manifest);
END;
CREATE TRIGGER search_blob_removed AFTER DELETE ON blob BEGIN
    UPDATE search_progress SET blobs = (SELECT coalesce(max(id), 0) FROM blob)
     WHERE blobs > (SELECT coalesce(max(id), 0) FROM blob);
END;
