"""Passwords: hashing, checking, htpasswd files, throttling of failed logins."""
