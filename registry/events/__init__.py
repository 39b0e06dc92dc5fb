"""Events: tells webhooks what happened to the content, and records pulls as events."""
