"""Commands for the upkeep of the store: jobs, garbage collection, retention, backup and others."""
