"""Describes stored tags, images and artifacts for people: used by the routes of `/api/v1` and by the web pages."""
