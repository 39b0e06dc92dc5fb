-- 1: the blob's bytes came for this repository, or its upstream said that this repository has the blob. Links from before
-- this table knew the difference count as 0: where it matters, the upstream is asked once.
ALTER TABLE blob_link ADD COLUMN confirmed INTEGER NOT NULL DEFAULT 0;
