"""The service behind the token endpoint `/token`: issues bearer tokens and refresh tokens to clients."""
