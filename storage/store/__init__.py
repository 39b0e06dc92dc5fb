"""The hosted registry, over any metadata store and any blob store."""
