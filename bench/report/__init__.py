"""The report of a bench: figures, goals, tables and plots."""
