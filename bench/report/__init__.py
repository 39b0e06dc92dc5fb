"""Figures, goals, tables and plots."""
