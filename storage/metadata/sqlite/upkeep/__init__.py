"""Tables of the metadata database for background jobs (*upkeep*), pulls, the tag history, disk usage and damaged
content."""
