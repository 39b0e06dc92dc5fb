"""Load generators. Each is a separate program, and all servers are measured with the same programs."""
