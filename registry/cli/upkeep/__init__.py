"""Commands of upkeep: jobs, garbage collection, retention, backup and others."""
