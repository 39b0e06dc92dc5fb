-- Events: what happened to content, and which webhooks have to receive them. Times are seconds since 1970.

-- Who wants which events: one row for each webhook, and one with the empty name for the list of events that is kept.
-- `actions` and `repositories` (patterns of names) are JSON arrays. Without rows, no event is recorded.
CREATE TABLE event_reader (
    name         TEXT PRIMARY KEY,
    actions      TEXT NOT NULL,
    repositories TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- The row of a change is added in the transaction of the change. `kept`: 1 if the event is in the list that people and
-- programs read, 0 if it is stored only until the webhooks have received it. The newest row is never deleted, so that
-- no later event gets the id of an earlier one.
CREATE TABLE event (
    id         INTEGER PRIMARY KEY,
    uuid       TEXT NOT NULL,
    at         REAL NOT NULL,
    action     TEXT NOT NULL,
    repository TEXT NOT NULL,
    tag        TEXT,
    digest     TEXT,
    previous   TEXT,                            -- what the tag pointed at before; NULL: it is new or did not move
    media_type TEXT NOT NULL,
    size       INTEGER NOT NULL,
    actor      TEXT NOT NULL,
    address    TEXT NOT NULL,
    request_id TEXT NOT NULL,
    user_agent TEXT NOT NULL,
    reason     TEXT NOT NULL,
    kept       INTEGER NOT NULL
) STRICT;
CREATE INDEX event_kept ON event (kept);        -- and by id, as every index

-- The table has one row. No event with the id `kept_from` or a higher one was removed from the list.
CREATE TABLE event_list (
    kept_from INTEGER NOT NULL
) STRICT;
INSERT INTO event_list (kept_from) VALUES (1);

-- An event that a webhook has not received yet. The row is deleted when the webhook has received it. `next_at`: when
-- the server tries again to send it. `dead`: when the server gave up; NULL: it still tries.
CREATE TABLE event_delivery (
    webhook    TEXT NOT NULL,
    event      INTEGER NOT NULL REFERENCES event (id),
    repository TEXT NOT NULL,
    attempts   INTEGER NOT NULL DEFAULT 0,
    next_at    REAL NOT NULL DEFAULT 0,
    dead       REAL,
    error      TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (webhook, event)
) STRICT, WITHOUT ROWID;
CREATE INDEX event_delivery_event ON event_delivery (event);
CREATE INDEX event_delivery_pending ON event_delivery (webhook, repository, event) WHERE dead IS NULL;
CREATE INDEX event_delivery_dead ON event_delivery (event, webhook) WHERE dead IS NOT NULL;
