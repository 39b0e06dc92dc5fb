-- The triggers that refuse a change because of a quota, with a constant message: SQLite before 3.47 takes nothing else
-- in `raise`, and a program that cannot parse one trigger cannot open the database at all. They do the same as those of
-- 0007. After a refusal, `usage_tables` finds out which quota caused it.
DROP TRIGGER usage_blob_added;
CREATE TRIGGER usage_blob_added AFTER INSERT ON usage_blob BEGIN
    UPDATE usage_scope SET blobs = blobs + 1, bytes = bytes + NEW.size WHERE id = NEW.scope;
    SELECT raise(ABORT, 'a quota is exceeded') FROM usage_scope
     WHERE id = NEW.scope AND complete = 1 AND bytes > max_bytes;
END;
DROP TRIGGER usage_tag_added;
CREATE TRIGGER usage_tag_added AFTER INSERT ON tag
  WHEN EXISTS (SELECT 1 FROM usage_member WHERE repository = NEW.repository)
BEGIN
    UPDATE usage_scope SET tags = tags + 1
     WHERE id IN (SELECT scope FROM usage_member
                   WHERE repository = NEW.repository AND (tags_to IS NULL OR NEW.name <= tags_to));
    SELECT raise(ABORT, 'a quota is exceeded') FROM usage_member m JOIN usage_scope s ON s.id = m.scope
     WHERE m.repository = NEW.repository AND s.complete = 1 AND s.tags > s.max_tags;
END;
