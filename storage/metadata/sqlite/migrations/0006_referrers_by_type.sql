-- With this index, a list of referrers of one artifact type reads no other referrers.
CREATE INDEX manifest_subject_type ON manifest (repository, subject, artifact_type, digest) WHERE subject IS NOT NULL;
