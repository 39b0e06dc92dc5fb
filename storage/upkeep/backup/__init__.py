"""Backups of a registry: the directory that they are stored in, the work of a backup, and the restore."""
