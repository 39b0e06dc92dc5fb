-- 1: the blob was pushed to or fetched for this repository, or its upstream said that this repository has the blob. Links
-- older than this column get 0, and the upstream is asked once if the difference matters.
ALTER TABLE blob_link ADD COLUMN confirmed INTEGER NOT NULL DEFAULT 0;
