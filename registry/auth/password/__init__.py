"""Passwords: hashing, checking, accounts in an htpasswd file, and throttling of failed logins."""
