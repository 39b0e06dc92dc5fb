"""The OCI distribution spec, fact by fact, against a running server with two workers. Files bear its headings."""
