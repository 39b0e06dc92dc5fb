"""Facts that hold for every `storage.interface.Registry`, whatever is behind it."""
