"""The HTTP routes outside the distribution API `/v2`, as FastAPI routers: the management API, the login by browser, the
token endpoint, the health checks and the documentation."""
