-- `grants_version` increases with every change of a grant, `epoch` also with all other changes of accounts, tokens and
-- keys. Accounts can have thousands of grants. Processes cache them, and read them again only after their version has
-- changed.
ALTER TABLE access ADD COLUMN grants_version INTEGER NOT NULL DEFAULT 1;
CREATE TRIGGER access_grant_added AFTER INSERT ON access_grant BEGIN
    UPDATE access SET grants_version = grants_version + 1;
END;
CREATE TRIGGER access_grant_changed AFTER UPDATE ON access_grant BEGIN
    UPDATE access SET grants_version = grants_version + 1;
END;
CREATE TRIGGER access_grant_removed AFTER DELETE ON access_grant BEGIN
    UPDATE access SET grants_version = grants_version + 1;
END;
