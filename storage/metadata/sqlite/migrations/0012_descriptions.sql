-- What people have written about a repository (Markdown); empty: they have removed it. `revision` grows with each
-- change.
CREATE TABLE repository_description (
    repository INTEGER PRIMARY KEY REFERENCES repository (id),
    revision   INTEGER NOT NULL,
    text       TEXT NOT NULL,
    at         REAL NOT NULL,
    actor      TEXT NOT NULL
) STRICT;
