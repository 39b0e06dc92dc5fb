-- Sessions of people who logged in with a browser. Times are seconds since 1970.

-- The account may have no row in `account`, because users of an htpasswd file have none.
CREATE TABLE login_session (
    id         TEXT PRIMARY KEY,
    account    TEXT NOT NULL,
    method     TEXT NOT NULL,                   -- password, openid
    secret     BLOB NOT NULL,                   -- its hash
    created    REAL NOT NULL,
    expires    REAL NOT NULL,
    seen       REAL NOT NULL,                   -- about when the last request came
    address    TEXT NOT NULL,                   -- of the browser at the login
    user_agent TEXT NOT NULL,
    version    INTEGER,                         -- of the account at the login; NULL: the account has no row
    stamp      TEXT,                            -- hash of the source outside the store; NULL: there is none
    groups     TEXT NOT NULL                    -- JSON: groups that the OpenID provider named
) STRICT, WITHOUT ROWID;
CREATE INDEX login_session_account ON login_session (account, created);
CREATE INDEX login_session_expires ON login_session (expires);
