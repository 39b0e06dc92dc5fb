"""Entrepot beside another registry."""
