"""The status of a running server: each worker process writes a report, and readers combine the reports."""
