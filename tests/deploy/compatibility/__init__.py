"""Which clients work, and with which settings: the table in docs/en/compatibility.md."""
