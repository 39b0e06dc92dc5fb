"""Exports of images into OCI image layouts and docker archives, and imports from these files."""
