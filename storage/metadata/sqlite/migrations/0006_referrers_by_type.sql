-- A list of referrers of one type reads no others.
CREATE INDEX manifest_subject_type ON manifest (repository, subject, artifact_type, digest) WHERE subject IS NOT NULL;
