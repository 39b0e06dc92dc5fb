-- Who may do what, and what was done. Times are seconds since 1970. Accounts may stand here by a name that is in no row
-- of `account`: people of an htpasswd file or of another issuer are in groups and have grants as well.

-- One row. `epoch` grows with every change that what a client may do is made of; `closed` is set once and never back.
CREATE TABLE access (
    id       INTEGER PRIMARY KEY CHECK (id = 1),
    epoch    INTEGER NOT NULL,
    closed   INTEGER NOT NULL,
    instance TEXT NOT NULL                      -- this store's own random name
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
    version  INTEGER NOT NULL,                  -- the epoch of its last change that ends what was proved before
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
    retired REAL,                               -- NULL: it signs
    until   REAL                                -- what it signed is taken until then
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX signing_key_signs ON signing_key (retired IS NULL) WHERE retired IS NULL;

-- Failed attempts to log in, by what they are counted under: until when they are paid for.
CREATE TABLE login_pace (
    key   TEXT PRIMARY KEY,
    until REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX login_pace_until ON login_pace (until);

-- What was done, tags aside: those have `tag_history`.
CREATE TABLE audit (
    id         INTEGER PRIMARY KEY,
    at         REAL NOT NULL,
    actor      TEXT NOT NULL,
    action     TEXT NOT NULL,
    target     TEXT NOT NULL,                   -- whom or what: an account, a group, a repository
    part       TEXT NOT NULL,                   -- what of it: '@sha256:...', ':tag'
    outcome    TEXT NOT NULL,                   -- ok, denied, failed
    address    TEXT NOT NULL,
    request_id TEXT NOT NULL,
    user_agent TEXT NOT NULL,
    detail     TEXT,                            -- JSON
    count      INTEGER NOT NULL
) STRICT;
CREATE INDEX audit_at ON audit (at);
CREATE INDEX audit_actor ON audit (actor, at);
CREATE INDEX audit_action ON audit (action, at) WHERE action <> 'manifest.put';    -- of those there are many
CREATE INDEX audit_target ON audit (target, at);
CREATE INDEX audit_refused ON audit (outcome, at) WHERE outcome <> 'ok';

-- The audit log shows these lines among its own, by time.
DROP INDEX tag_history_tag;
CREATE INDEX tag_history_repository ON tag_history (repository, at, tag);
CREATE INDEX tag_history_actor ON tag_history (actor, at);
CREATE INDEX tag_history_at ON tag_history (at);
CREATE INDEX tag_history_deleted ON tag_history (at) WHERE digest IS NULL;

-- Whose the session is: '' for nobody's.
ALTER TABLE upload ADD COLUMN owner TEXT NOT NULL DEFAULT '';
