-- `confirmed` is 1 if the blob was pushed to or fetched for this repository, or if its upstream registry said that it
-- has the blob in this repository. Links that are older than this column get 0, because this is not known of them; the
-- mirror then asks the upstream.
ALTER TABLE blob_link ADD COLUMN confirmed INTEGER NOT NULL DEFAULT 0;
