"""Pull-through cache of upstream registries: `mirror.Mirror`."""
