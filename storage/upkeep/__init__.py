"""Background work (*upkeep*) on a registry's data, such as garbage collection, scrub (a check of all stored bytes),
eviction and backups."""
