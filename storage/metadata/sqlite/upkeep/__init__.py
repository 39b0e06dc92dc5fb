"""Tables of the metadata database that upkeep needs: jobs, pulls, the history of tags, use of space, damaged blobs."""
