"""Events: delivers events about the content to webhooks, and records pulls as events."""
