"""Pull-through cache of upstream registries. The entry point is `mirror.Mirror`."""
