-- Accounts, rights and the audit log. Times are seconds since 1970. A member of a group or the subject of a grant may
-- have no row in `account`, because users of an htpasswd file or of an external issuer of tokens have none.

-- The table has one row. `epoch` increases with every change that affects rights. `closed` becomes 1 when the first
-- account is added, and stays 1. While it is 0, everybody may do everything.
CREATE TABLE access (
    id       INTEGER PRIMARY KEY CHECK (id = 1),
    epoch    INTEGER NOT NULL,
    closed   INTEGER NOT NULL,
    instance TEXT NOT NULL                      -- random name of this database
) STRICT;
INSERT INTO access (id, epoch, closed, instance) VALUES (1, 1, 0, lower(hex(randomblob(16))));
CREATE TRIGGER access_stays_closed BEFORE UPDATE OF closed ON access WHEN OLD.closed > NEW.closed
BEGIN
    SELECT raise(ABORT, 'a closed registry stays closed');
END;

CREATE TABLE account (
    name     TEXT PRIMARY KEY,
    kind     TEXT NOT NULL,                     -- user, robot
    password TEXT,                              -- its hash
    enabled  INTEGER NOT NULL,
    admin    INTEGER NOT NULL,
    version  INTEGER NOT NULL,                  -- epoch of its last change that invalidates earlier logins
    created  REAL NOT NULL,
    note     TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE account_group (
    name    TEXT PRIMARY KEY,
    created REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE group_member (
    name   TEXT NOT NULL REFERENCES account_group (name),
    member TEXT NOT NULL,
    PRIMARY KEY (name, member)
) STRICT, WITHOUT ROWID;
CREATE INDEX group_member_member ON group_member (member, name);

CREATE TABLE access_grant (
    kind    TEXT NOT NULL,                      -- user, robot, group, everyone, authenticated
    name    TEXT NOT NULL,                      -- '' for the last two
    pattern TEXT NOT NULL,
    actions INTEGER NOT NULL,                   -- 1 pull, 2 push, 4 delete, 8 admin, added up
    PRIMARY KEY (kind, name, pattern)
) STRICT, WITHOUT ROWID;

CREATE TABLE api_token (
    id      TEXT PRIMARY KEY,
    account TEXT NOT NULL REFERENCES account (name),
    purpose TEXT NOT NULL,                      -- personal, login
    note    TEXT NOT NULL,
    secret  BLOB NOT NULL,                      -- its hash
    created REAL NOT NULL,
    expires REAL,                               -- NULL: never
    limits  TEXT,                               -- JSON: pairs of pattern and actions; NULL: all that the account may
    used    REAL
) STRICT, WITHOUT ROWID;
CREATE INDEX api_token_account ON api_token (account, id);
CREATE INDEX api_token_expires ON api_token (expires) WHERE expires IS NOT NULL;

CREATE TABLE signing_key (
    id      TEXT PRIMARY KEY,
    secret  BLOB NOT NULL,
    created REAL NOT NULL,
    retired REAL,                               -- NULL: this key signs
    until   REAL                                -- tokens it signed are valid until then
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX signing_key_signs ON signing_key (retired IS NULL) WHERE retired IS NULL;

-- Throttling of failed logins. Each failed login under a key (an account, a client's network, or both) moves `until`
-- further into the future. While `until` lies too far in the future, logins under the key are refused.
CREATE TABLE login_pace (
    key   TEXT PRIMARY KEY,
    until REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX login_pace_until ON login_pace (until);

-- The audit log, except the lines about changes of tags, which are in `tag_history`.
CREATE TABLE audit (
    id         INTEGER PRIMARY KEY,
    at         REAL NOT NULL,
    actor      TEXT NOT NULL,
    action     TEXT NOT NULL,
    target     TEXT NOT NULL,                   -- the account, group, grant subject, key or repository
    part       TEXT NOT NULL,                   -- of a repository: '@sha256:...' or ':tag'; otherwise ''
    outcome    TEXT NOT NULL,                   -- ok, denied, failed
    address    TEXT NOT NULL,
    request_id TEXT NOT NULL,
    user_agent TEXT NOT NULL,
    detail     TEXT,                            -- JSON
    count      INTEGER NOT NULL
) STRICT;
CREATE INDEX audit_at ON audit (at);
CREATE INDEX audit_actor ON audit (actor, at);
CREATE INDEX audit_action ON audit (action, at) WHERE action <> 'manifest.put';    -- there are many of these
CREATE INDEX audit_target ON audit (target, at);
CREATE INDEX audit_refused ON audit (outcome, at) WHERE outcome <> 'ok';

-- Pages of the audit log merge `tag_history` with `audit` by time, so the history is read in the order of time too.
DROP INDEX tag_history_tag;
CREATE INDEX tag_history_repository ON tag_history (repository, at, tag);
CREATE INDEX tag_history_actor ON tag_history (actor, at);
CREATE INDEX tag_history_at ON tag_history (at);
CREATE INDEX tag_history_deleted ON tag_history (at) WHERE digest IS NULL;

-- `owner`: name of the actor that may continue the upload session; '' if every client may.
ALTER TABLE upload ADD COLUMN owner TEXT NOT NULL DEFAULT '';
