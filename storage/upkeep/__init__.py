"""Background work (*upkeep*) on a registry's data, such as garbage collection, scrub, eviction and backups."""
