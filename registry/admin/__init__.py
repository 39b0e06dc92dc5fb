"""The HTTP routes outside the distribution API `/v2`, as FastAPI routers: management API, browser login, token
endpoint, health checks and documentation."""
